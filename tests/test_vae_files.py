"""Autoencoders as people saved them: CompVis, diffusers, checkpoints, wrapped and half; export."""
import argparse
import hashlib
import json
import math
import re
import shutil

import pytest
import torch

import sample
import train
import vae
from conftest import CPU, close, needs, one_line, statistics, tiny_config
from support.commands import UserError
from support.files import load_file, load_tensors

SMALL = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_levels=(), latent_channels=4)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return vae.AutoencoderKL(SMALL)


def same(net, state):
    own = net.state_dict()
    return own.keys() == state.keys() and all(torch.equal(t, state[k].float()) for k, t in own.items())


@pytest.fixture(scope="session")
def f8d4():
    torch.manual_seed(0)
    return vae.AutoencoderKL("f8d4").eval()


# --- In every form ----------------------------------------------------------------------------------------------------

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
             for name, t in load_file(tmp_path / f"folder/{vae.WEIGHTS[0]}").items()}
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
    saved = load_tensors(ckpt)
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


WRAPPED = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "state_dict": s},
    "beside": lambda s: {"state_dict": s | {
        "loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2),
        "model_ema.num_updates": torch.tensor(5), "linear_proj.weight": torch.ones(2, 2)}},
    "first_stage": lambda s: {f"first_stage_model.{k}": t for k, t in s.items()} | {
        "model.diffusion_model.out.weight": torch.ones(2)},
    "ddp": lambda s: {f"module.{k}": t for k, t in s.items()},
    "compiled": lambda s: {f"_orig_mod.module.{k}": t for k, t in s.items()},
    "compiled parts": lambda s: {k.replace("coder.", "coder._orig_mod."): t for k, t in s.items()},
    "half": lambda s: {k: t.half() for k, t in s.items()},
    "vae": lambda s: {"vae": s, "steps": 4},
}


@pytest.mark.parametrize("form", WRAPPED)
@pytest.mark.parametrize("suffix", ["pt", "bin", "ckpt"])
def test_a_vae_as_it_was_saved(form, suffix, small, tmp_path):
    torch.save(WRAPPED[form](small.state_dict()), tmp_path / f"a.{suffix}")
    net, stats = vae.load_vae(tmp_path / f"a.{suffix}")
    state = small.state_dict()
    assert same(net, {k: t.half() for k, t in state.items()} if form == "half" else state) and stats is None
    assert all(t.dtype == torch.float32 for t in net.state_dict().values())


def test_groups_are_the_named_ones_or_the_checkpoints(tmp_path):
    """No tensor shows the groups of a norm: f4d8's shapes have 1, other VAEs 32, unless the file says otherwise."""
    torch.manual_seed(0)
    for config, groups, saved in (("f4d8", 1, {}), ("f4d32", 1, {}), (SMALL, 32, {}),
                                  (SMALL | dict(groups=16), 16, dict(vae_groups=16))):
        net = vae.AutoencoderKL(config)
        ckpt = dict(ema={}, model={}, args=saved, steps=0, vae=net.state_dict())
        torch.save(ckpt, tmp_path / "a.pt")
        assert vae.load_vae(tmp_path / "a.pt")[0].config == net.config and net.config["groups"] == groups
        torch.save(ckpt | dict(args=argparse.Namespace(**saved)), tmp_path / "a.pt")
        assert vae.load_vae(tmp_path / "a.pt")[0].config == net.config
    torch.save(vae.AutoencoderKL(SMALL | dict(ch=24, groups=8)).state_dict(), tmp_path / "odd.pt")
    with pytest.raises(UserError, match="do not divide into 32 groups"):
        vae.load_vae(tmp_path / "odd.pt")


# --- As diffusers has them --------------------------------------------------------------------------------------------

def test_diffusers_names_are_the_published_ones(f8d4):
    state = {vae.rename(name, 4): t for name, t in f8d4.state_dict().items()}
    lines = sorted(f"{name} {tuple(t.squeeze().shape) if 'attentions' in name else tuple(t.shape)}"
                   for name, t in state.items())
    assert len(lines) == 248 and hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "600696bc94ffc80f"


@pytest.fixture(scope="module", params=["f8d4", "f16d32", "f4d8"])
def exported(request, tmp_path_factory, f8d4):
    """An autoencoder, its latent statistics, and the folder to which both were exported."""
    torch.manual_seed(1)
    ours = f8d4 if request.param == "f8d4" else vae.AutoencoderKL(request.param).eval()
    stats, folder = statistics(ours.latent_channels), tmp_path_factory.mktemp("exported") / "out"
    vae.export_vae(ours, stats, 32, folder)
    return ours, stats, folder


def test_export_reads_back_exactly(exported):
    ours, stats, folder = exported
    again, stats_again = vae.load_vae(folder)
    assert again.config == ours.config
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in ours.state_dict().items())
    assert all(torch.allclose(a, b) for a, b in zip(stats, stats_again))
    with pytest.raises(UserError, match="exists already"):
        vae.export_vae(ours, stats, 32, folder)


@needs("diffusers")
def test_export_is_diffusers(exported):
    from diffusers import AutoencoderKL
    ours, stats, folder = exported
    theirs = AutoencoderKL.from_pretrained(folder).eval()
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


CONFIGS = {                                                # diffusers' settings -> ours, written out
    "sd3-like": (dict(block_out_channels=(32, 64, 64, 128), layers_per_block=1, latent_channels=16,
                      use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609), (),
                 dict(ch=32, ch_mult=(1, 2, 2, 4), num_res_blocks=1, attn_levels=(), latent_channels=16, groups=32,
                      quant_conv=False, post_quant_conv=False, mid_attention=True)),
    "attention": (dict(block_out_channels=(32, 64, 96), layers_per_block=2, latent_channels=4), (1, 2),
                  dict(ch=32, ch_mult=(1, 2, 3), num_res_blocks=2, attn_levels=(1, 2), latent_channels=4, groups=32,
                       quant_conv=True, post_quant_conv=True, mid_attention=True)),
    "plain middle": (dict(block_out_channels=(64, 96), layers_per_block=1, latent_channels=3,
                          mid_block_add_attention=False, use_post_quant_conv=False, norm_num_groups=16), (),
                     dict(ch=64, ch_mult=(1, 1.5), num_res_blocks=1, attn_levels=(), latent_channels=3, groups=16,
                          quant_conv=True, post_quant_conv=False, mid_attention=False)),
}


@pytest.fixture(scope="module", params=CONFIGS)
def theirs(request):
    """An AutoencoderKL of diffusers, randomly initialised (norms and biases too); the config that ours should have."""
    from diffusers import AutoencoderKL
    settings, attention, ours = CONFIGS[request.param]
    levels = range(len(settings["block_out_channels"]))
    kinds = ["Attn" if i in attention else "" for i in levels]
    torch.manual_seed(1)
    net = AutoencoderKL(down_block_types=[f"{kind}DownEncoderBlock2D" for kind in kinds],
                        up_block_types=[f"{kind}UpDecoderBlock2D" for kind in kinds[::-1]], **settings).eval()
    for parameter in net.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return net, ours


def agree(ours, theirs):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected, got = theirs.encode(x).latent_dist, ours.encode(x)
        assert torch.allclose(got.moments, expected.parameters, rtol=1e-4, atol=1e-5)
        assert expected.parameters.std() > 0.05
        rec = theirs.decode(expected.mean).sample
        assert torch.allclose(ours.decode(expected.mean), rec, rtol=1e-4, atol=1e-5) and rec.std() > 0.05


@needs("diffusers")
@pytest.mark.parametrize("how", [{}, dict(safe_serialization=False), dict(variant="fp16"),
                                 dict(variant="fp16", safe_serialization=False)], ids=str)
def test_any_autoencoder_of_diffusers(how, theirs, tmp_path):
    net, config = theirs
    net.save_pretrained(tmp_path, **how)
    ours, (mean, std) = vae.load_vae(tmp_path)
    assert ours.config == config and ours.stride == 2 ** (len(config["ch_mult"]) - 1)
    agree(ours, net)
    channels = config["latent_channels"]
    assert torch.allclose(mean, torch.full((channels,), net.config.shift_factor or 0.0))
    assert torch.allclose(std, torch.full((channels,), 1 / net.config.scaling_factor))


@needs("diffusers")
def test_any_autoencoder_is_exported(theirs, tmp_path):
    net, config = theirs
    torch.manual_seed(2)
    ours, channels = vae.AutoencoderKL(config).eval(), config["latent_channels"]
    stats = torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels)
    vae.export_vae(ours, stats, 32, tmp_path / "out")
    back = type(net).from_pretrained(tmp_path / "out").eval()
    agree(ours, back)
    assert back.config.latents_std == pytest.approx(stats[1].tolist()) and back.config.scaling_factor == 1
    again, stats_again = vae.load_vae(tmp_path / "out")
    assert again.config == config and same(again, ours.state_dict())
    assert all(torch.allclose(a, b) for a, b in zip(stats, stats_again))


@needs("diffusers")
def test_compvis_names_of_any_autoencoder(theirs, tmp_path):
    """The same tensors under CompVis' names, as FLUX' own ae.safetensors has them."""
    net, config = theirs
    net.save_pretrained(tmp_path / "folder")
    ours, _ = vae.load_vae(tmp_path / "folder")
    vae.save_file(ours.state_dict(), tmp_path / "ae.safetensors")
    if config["groups"] == 32:
        agree(vae.load_vae(tmp_path / "ae.safetensors")[0], net)


def test_a_config_that_leaves_things_out(small, tmp_path):
    """As diffusers reads it: sd-vae-ft-mse's config.json has no scaling_factor, and SD's is 0.18215."""
    stats = torch.zeros(4), torch.ones(4)
    vae.export_vae(small, stats, 32, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    for key in ("scaling_factor", "latents_mean", "latents_std", "norm_num_groups", "use_quant_conv"):
        del config[key]
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    net, (mean, std) = vae.load_vae(tmp_path / "out")
    assert same(net, small.state_dict()) and mean.tolist() == [0] * 4
    assert std.tolist() == pytest.approx([1 / 0.18215] * 4)
    for change, message in ((dict(_class_name="AutoencoderDC"), "AutoencoderDC"), (dict(act_fn="relu"), "relu"),
                            (dict(norm_num_groups=-8), "-8 groups"), (dict(scaling_factor=0), "not 4 finite"),
                            (dict(norm_num_groups=12), "do not divide into 12 groups")):
        (tmp_path / "out/config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            vae.load_vae(tmp_path / "out")
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    (tmp_path / "out/diffusion_pytorch_model.safetensors").rename(tmp_path / "out/model.safetensors")
    with pytest.raises(UserError, match="no weights in it; looked for diffusion_pytorch_model.safetensors"):
        vae.load_vae(tmp_path / "out")


# --- The command; what is no VAE --------------------------------------------------------------------------------------

def test_export_command(small, tmp_path, command):
    ema = {"bn.running_mean": torch.arange(4.0), "bn.running_var": torch.ones(4)}
    torch.save(dict(ema=ema, model={}, args={}, steps=0, vae=small.state_dict()), tmp_path / "a.pt")
    assert "diffusers AutoencoderKL" in command("vae", "export", "a.pt", "out", "--resolution=64")
    net, (mean, std) = vae.load_vae(tmp_path / "out")
    assert same(net, small.state_dict()) and mean.tolist() == [0, 1, 2, 3]
    assert std.tolist() == pytest.approx([math.sqrt(1 + 1e-4)] * 4)
    assert json.loads((tmp_path / "out/config.json").read_text())["sample_size"] == 64
    one_line(command("vae", "export", "a.pt", "out", code=2), "out: exists already")


def test_what_diffusers_cannot_hold_is_not_exported(tmp_path):
    net = vae.AutoencoderKL(SMALL | dict(ch_mult=(2, 2)))
    with pytest.raises(UserError, match="first level"):
        vae.export_vae(net, (torch.zeros(4), torch.ones(4)), 32, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_a_frozen_vae_says_what_to_give(tmp_path):
    torch.save(dict(ema={}, model={}, args={}, steps=0), tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt: no VAE in this checkpoint, it was frozen; give its file by --vae-ckpt"):
        vae.load_vae(tmp_path / "a.pt")


@pytest.mark.parametrize("state, message", [
    ({"blocks.0.weight": torch.ones(2)},
     "no VAEs in it .keys ending in encoder.conv_in.weight.; its keys are blocks.0.weight"),
    ([torch.ones(2)], "no state dict in it"),
    ({"encoder.conv_in.weight": torch.ones(4, 3, 3, 3)}, "no AutoencoderKL in it"),
    ({"encoder.conv_in.weight": torch.ones(4, 3, 3, 3, dtype=torch.int8)},
     "encoder.conv_in.weight holds values that are not finite floats"),
    ({f"{k}.encoder.conv_in.weight": torch.ones(4, 3, 3, 3) for k in "ab"}, "2 VAEs in it .*its keys are a., b."),
    ({"encoder.conv_in.weight": torch.full((4, 3, 3, 3), math.inf)}, "not finite")])
def test_what_is_no_vae_is_said_truly(state, message, tmp_path):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"^[^\n]*a.pt: [^\n]*{message}"):
        vae.load_vae(tmp_path / "a.pt")


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
    for file, match in (("short.pt", "not a readable"),
                        ("nan.pt", "encoder.conv_in.weight holds values that are not finite"),
                        ("folder", "not a diffusers AutoencoderKL"), ("nowhere.pt", "no such file"),
                        ("five.pt", "not 8 finite numbers"), ("list.pt", "no state dict")):
        with pytest.raises(UserError, match=match) as e:
            vae.load_vae(tmp_path / file)
        assert "\n" not in str(e.value)
    bad = load_tensors(short_run / "exps/a/checkpoints/0000004.pt")
    bad["ema"]["final_layer.linear.bias"][0] = math.inf
    torch.save(bad, tmp_path / "inf.pt")
    with pytest.raises(UserError, match="not finite"):
        sample.load_checkpoint(tmp_path / "inf.pt")
