"""VAE files as others saved them: CompVis, diffusers, checkpoints, wrapped, half precision, damaged;
export."""
import argparse
import hashlib
import json
import math
import re

import pytest
import torch

import sample
import train
import vae
from conftest import CPU, needs, one_line, statistics, tiny_config
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


def change_config(folder, **changes):
    """Change keys of a folder's config.json; None: take one out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# --- State dicts --------------------------------------------------------------------------------------------

WRAPPED = {
    "state_dict": lambda s: {"epoch": 3, "state_dict": s | {
        "loss.logvar": torch.zeros(()), "model_ema.num_updates": torch.tensor(5)}},
    "first_stage": lambda s: {f"first_stage_model.{k}": t for k, t in s.items()} | {
        "model.diffusion_model.out.weight": torch.ones(2)},
    "two": lambda s: s | {f"ema.{k}": t + 1 for k, t in s.items()},
    "ddp, compiled": lambda s: {f"module.{k}".replace("coder.", "coder._orig_mod."): t for k, t in s.items()},
    "half": lambda s: {k: t.half() for k, t in s.items()},
    "vae": lambda s: {"vae": s, "steps": 4},
}


@pytest.mark.parametrize("form", WRAPPED)
def test_vae_is_found_in_a_file(form, small, tmp_path):
    state = small.state_dict()
    torch.save(WRAPPED[form](state), tmp_path / "a.ckpt")
    net, stats = vae.load_vae(tmp_path / "a.ckpt")
    assert same(net, {k: t.half() for k, t in state.items()} if form == "half" else state) and stats is None
    assert all(t.dtype == torch.float32 for t in net.state_dict().values())


def test_groups_are_those_of_the_named_architecture_or_the_checkpoint(tmp_path):
    """No tensor shows the groups of a norm: f4d8's shapes have 1, other VAEs 32, unless the checkpoint has
    them."""
    for config, args in (("f4d8", {}), (SMALL, argparse.Namespace()),
                         (SMALL | dict(groups=16), dict(vae_groups=16))):
        net = vae.AutoencoderKL(config)
        torch.save(dict(ema={}, model={}, args=args, steps=0, vae=net.state_dict()), tmp_path / "a.pt")
        assert vae.load_vae(tmp_path / "a.pt")[0].config == net.config


def test_statistics_are_read_with_the_weights(tmp_path, frozen_vae):
    net, stats = vae.load_vae(frozen_vae)
    assert torch.allclose(torch.stack(stats), torch.stack(statistics(8)))
    vae.save_file(net.state_dict(), tmp_path / "other.safetensors")
    vae.export_vae(net, stats, 32, tmp_path / "folder")
    words = dict(to_q="query", to_k="key", to_v="value") | {"to_out.0": "proj_attn"}   # diffusers before 0.18
    older = {re.sub(r"to_[qkv]|to_out\.0", lambda m: words[m[0]], name): t
             for name, t in load_file(tmp_path / "folder" / vae.WEIGHTS[0]).items()}
    torch.save(older, tmp_path / "older.pt")
    for file, expected in (("other.safetensors", None), ("folder", stats), ("older.pt", None)):
        again, found = vae.load_vae(tmp_path / file)
        assert same(again, net.state_dict()) and again.config == net.config
        assert found is expected or torch.allclose(torch.stack(found), torch.stack(expected))


def test_training_starts_from_saved_networks(tmp_path, short_run, frozen_vae):
    """--vae-ckpt takes VAE and latent statistics of a checkpoint; --init-from its SiT and their average, with
    another VAE that VAE's statistics; a pretrained discriminator is used from the first step."""
    ckpt = short_run / "exps/a/checkpoints/0000004.pt"
    saved = load_tensors(ckpt)
    m = train.build(tiny_config("--vae-ckpt", str(ckpt), "--num-classes", "2"), CPU)
    assert same(m.vae, saved["vae"]) and torch.equal(m.sit.bn.running_mean, saved["ema"]["bn.running_mean"])
    assert torch.allclose(m.ema.bn.running_var, saved["ema"]["bn.running_var"], rtol=1e-4)
    m = train.build(tiny_config("--init-from", str(ckpt), "--num-classes", "2", "--vae-ckpt",
                                str(frozen_vae)), CPU)
    for net, key in ((m.sit, "model"), (m.ema, "ema")):
        assert torch.equal(net.blocks[3].mlp.fc1.weight, saved[key]["blocks.3.mlp.fc1.weight"])
    mean, std = statistics(8)
    for net in (m.sit, m.ema):
        assert torch.allclose(net.bn.running_mean, mean) and torch.allclose(net.bn.running_var,
                                                                            std ** 2 - 1e-4)
    m = train.build(tiny_config("--vae-grad", "none", "--vae-ckpt", str(ckpt), "--num-classes", "2",
                                "--posterior-std", "0.3"), CPU)
    assert not m.has_statistics                                       # the file's are of another noise
    assert m.vae.encode(torch.zeros(1, 3, 32, 32)).logvar.unique().item() == pytest.approx(2 * math.log(0.3))
    with pytest.raises(UserError, match="4.pt: size mismatch for y_embedder.*of another model"):
        train.build(tiny_config("--init-from", str(ckpt), "--num-classes", "7"), CPU)
    saved = vae.Discriminator().state_dict()
    torch.save(saved, tmp_path / "disc.pt")
    cfg = train.parse_config(["--disc-pretrained-ckpt", str(tmp_path / "disc.pt"), "--disc-weight", "0.1"])
    m = train.build(cfg, CPU)
    assert cfg.disc_start == 0 and torch.equal(m.disc.main[0].weight, saved["main.0.weight"])


# --- diffusers ----------------------------------------------------------------------------------------------

def test_diffusers_names_are_the_published_ones():
    with torch.device("meta"):
        state = {vae.rename(name, 4, vae.RENAMED): t for name,
                 t in vae.AutoencoderKL("f8d4").state_dict().items()}
    lines = sorted(f"{name} {tuple(t.squeeze().shape) if 'attentions' in name else tuple(t.shape)}"
                   for name, t in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "600696bc94ffc80f"


OURS = dict(groups=32, mid_attention=True, quant_conv=True, post_quant_conv=True)
CONFIGS = {                                                # diffusers' settings, how it saves, our config
    "sd3-like": (dict(block_out_channels=(32, 64, 64, 128), layers_per_block=1, latent_channels=16,
                      use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305,
                      shift_factor=0.0609),
                 dict(variant="fp16"),
                 OURS | dict(ch=32, ch_mult=(1, 2, 2, 4), num_res_blocks=1, attn_levels=(),
                             latent_channels=16,
                             quant_conv=False, post_quant_conv=False)),
    "attention": (dict(block_out_channels=(32, 64, 96), layers_per_block=2, latent_channels=4), {},
                  OURS | dict(ch=32, ch_mult=(1, 2, 3), num_res_blocks=2, attn_levels=(1, 2),
                              latent_channels=4)),
    "plain middle": (dict(block_out_channels=(64, 96), layers_per_block=1, latent_channels=3,
                          mid_block_add_attention=False, use_post_quant_conv=False, norm_num_groups=16),
                     dict(safe_serialization=False),
                     OURS | dict(ch=64, ch_mult=(1, 1.5), num_res_blocks=1, attn_levels=(), latent_channels=3,
                                 groups=16, post_quant_conv=False, mid_attention=False)),
}


def agree(ours, theirs):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected, got = theirs.encode(x).latent_dist, ours.encode(x)
        assert torch.allclose(got.moments, expected.parameters, rtol=1e-4, atol=1e-5)
        rec = theirs.decode(expected.mean).sample
        assert torch.allclose(ours.decode(expected.mean), rec, rtol=1e-4, atol=1e-5)
        assert expected.parameters.std() > 0.05 and rec.std() > 0.05


@needs("diffusers")
@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_autoencoders_are_read_and_exported(name, tmp_path):
    """With random norms and biases; under CompVis' names, too, as FLUX' own ae.safetensors has them."""
    from diffusers import AutoencoderKL
    settings, how, config = CONFIGS[name]
    kinds = ["Attn" if i in config["attn_levels"] else "" for i in range(len(config["ch_mult"]))]
    torch.manual_seed(1)
    theirs = AutoencoderKL(down_block_types=[f"{kind}DownEncoderBlock2D" for kind in kinds],
                           up_block_types=[f"{kind}UpDecoderBlock2D" for kind in kinds[::-1]],
                           **settings).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path / "in", **how)
    ours, (mean, std) = vae.load_vae(tmp_path / "in")
    assert ours.config == config and ours.stride == 2 ** (len(config["ch_mult"]) - 1)
    assert mean.tolist() == pytest.approx([theirs.config.shift_factor or 0.0] * ours.latent_channels)
    assert std.tolist() == pytest.approx([1 / theirs.config.scaling_factor] * ours.latent_channels)
    agree(ours, theirs)

    stats = statistics(ours.latent_channels)
    vae.export_vae(ours, stats, 32, tmp_path / "out")
    back = AutoencoderKL.from_pretrained(tmp_path / "out").eval()
    agree(ours, back)
    assert back.config.latents_mean == pytest.approx(stats[0].tolist()) and back.config.scaling_factor == 1
    assert back.config.latents_std == pytest.approx(stats[1].tolist())
    again, stats_again = vae.load_vae(tmp_path / "out")
    assert again.config == config and same(again, ours.state_dict())
    assert torch.allclose(torch.stack(stats_again), torch.stack(stats))
    vae.save_file(ours.state_dict(), tmp_path / "ae.safetensors")
    assert vae.load_vae(tmp_path / "ae.safetensors")[0].config == config | dict(groups=32)


def test_config_of_a_diffusers_folder(small, tmp_path):
    """What it lacks is as in diffusers: sd-vae-ft-mse's config.json has no scaling_factor, and SD's is
    0.18215."""
    folder = tmp_path / "out"
    vae.export_vae(small, (torch.zeros(4), torch.ones(4)), 32, folder)
    change_config(folder, scaling_factor=None, latents_mean=None, latents_std=None, norm_num_groups=None,
                  use_quant_conv=None)
    net, (mean, std) = vae.load_vae(folder)
    assert same(net, small.state_dict()) and mean.tolist() == [0] * 4
    assert std.tolist() == pytest.approx([1 / 0.18215] * 4)
    good = (folder / "config.json").read_text()
    for change, message in ((dict(_class_name="AutoencoderDC"), "AutoencoderDC"),
                            (dict(act_fn="relu"), "relu"),
                            (dict(scaling_factor=0), "not 4 finite"),
                            (dict(norm_num_groups=12), "do not divide into 12 groups")):
        change_config(folder, **change)
        with pytest.raises(UserError, match=message):
            vae.load_vae(folder)
        (folder / "config.json").write_text(good)
    (folder / vae.WEIGHTS[0]).unlink()
    with pytest.raises(UserError, match="no weights in it"):
        vae.load_vae(folder)


# --- The command; files without a VAE -----------------------------------------------------------------------

def test_export_command(small, tmp_path, command):
    ema = {"bn.running_mean": torch.arange(4.0), "bn.running_var": torch.ones(4)}
    torch.save(dict(ema=ema, model={}, args={}, steps=0, vae=small.state_dict()), tmp_path / "a.pt")
    command("vae", "export", "a.pt", "out", "--resolution=64")
    net, (mean, std) = vae.load_vae(tmp_path / "out")
    assert same(net, small.state_dict()) and mean.tolist() == [0, 1, 2, 3]
    assert std.tolist() == pytest.approx([math.sqrt(1 + 1e-4)] * 4)
    assert json.loads((tmp_path / "out/config.json").read_text())["sample_size"] == 64
    one_line(command("vae", "export", "a.pt", "out", code=2), "out: exists already")


FIRST, CONV = "encoder.conv_in.weight", torch.ones(4, 3, 3, 3)


@pytest.mark.parametrize("state, message", [
    ({"blocks.0.weight": CONV}, f"no VAEs in it .keys ending in {FIRST}"),
    ([CONV], "no state dict in it"),
    ({FIRST: CONV}, "no AutoencoderKL in it"),
    ({f"{k}.{FIRST}": CONV for k in "ab"}, "2 VAEs in it"),
    ({FIRST: CONV.to(torch.int8)}, f"{FIRST} holds values that are not finite floats"),
    ({FIRST: CONV * math.inf}, f"{FIRST} holds values that are not finite floats"),
    (dict(ema={}, model={}, args={}, steps=0), "no VAE in this checkpoint, it was frozen")])
def test_files_without_a_usable_vae(state, message, tmp_path):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"^[^\n]*{message}"):
        vae.load_vae(tmp_path / "a.pt")


def test_damaged_files(tmp_path, small, short_run):
    torch.save(small.state_dict(), tmp_path / "five.pt")
    torch.save(dict(latents_scale=torch.ones(1, 5, 1, 1), latents_bias=torch.ones(1, 5, 1, 1)),
               tmp_path / "five-latents-stats.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text("{")
    for file, match in (("folder", "not a diffusers AutoencoderKL"), ("five.pt", "not 4 finite numbers")):
        with pytest.raises(UserError, match=f"^[^\n]*{match}[^\n]*$"):
            vae.load_vae(tmp_path / file)
    bad = load_tensors(short_run / "exps/a/checkpoints/0000004.pt")
    bad["ema"]["final_layer.linear.bias"][0] = math.inf
    torch.save(bad, tmp_path / "inf.pt")
    with pytest.raises(UserError, match="not finite"):
        sample.load_checkpoint(tmp_path / "inf.pt")
