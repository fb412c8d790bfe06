"""VAEs of text-to-image models: architecture, subfolders of the hub, a discriminator trained beside a fixed
VAE."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
import vae
from conftest import CPU, SHORT, needs, one_line
from support.commands import UserError
from support.files import load_tensors

SMALL = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_levels=(), latent_channels=16, quant_conv=False,
             post_quant_conv=False, groups=16)


@pytest.fixture
def folder(tmp_path):
    """A small VAE of 16 channels as a folder of diffusers."""
    torch.manual_seed(0)
    vae.export_vae(vae.AutoencoderKL(SMALL), (torch.zeros(16), torch.ones(16)), 32, tmp_path / "vae")
    return tmp_path / "vae"


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@needs("diffusers")
def test_architecture_of_sd35_and_flux():
    from diffusers import AutoencoderKL
    with torch.device("meta"):                                        # the values of both config.json
        theirs = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4,
                               up_block_types=["UpDecoderBlock2D"] * 4,
                               block_out_channels=[128, 256, 512, 512], layers_per_block=2,
                               latent_channels=16,
                               norm_num_groups=32, use_quant_conv=False, use_post_quant_conv=False)
        ours = vae.AutoencoderKL("f8d16")
    renamed = {vae.rename(name, 4, vae.RENAMED): tensor.numel() for name, tensor in ours.state_dict().items()}
    assert renamed == {name: tensor.numel() for name, tensor in theirs.state_dict().items()}


def test_a_vae_in_a_subfolder_of_the_hub(folder, tmp_path, monkeypatch):
    """From the cache that huggingface_hub keeps, offline; without it one line."""
    cached, commit = tmp_path / "hub/models--owner--name", "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    folder.rename(cached / "snapshots" / commit / "vae")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    net, stats = vae.load_vae("owner/name/vae")
    assert net.latent_channels == 16 and stats[1].tolist() == [1] * 16
    with pytest.raises(UserError, match="owner/other/vae: not found locally"):
        vae.load_vae("owner/other/vae")


def test_flux2_is_read_without_its_batch_norm(folder):
    file = folder / vae.WEIGHTS[0]
    tensors = load_file(file)
    save_file(tensors | {"bn.running_mean": torch.zeros(64), "bn.running_var": torch.ones(64)}, file)
    before = vae.load_vae(folder)[0].state_dict()
    change_config(folder, _class_name="AutoencoderKLFlux2", scaling_factor=None)
    net, stats = vae.load_vae(folder)
    assert stats is None                                              # the latent norm measures its own
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    change_config(folder, _class_name="AutoencoderKLQwenImage")
    with pytest.raises(UserError, match="not a diffusers AutoencoderKL .*a causal 3D VAE"):
        vae.load_vae(folder)


def test_a_discriminator_for_a_vae_without_one(folder, image_dir, tmp_path, command):
    """--vae-only --vae-learning-rate 0 trains the discriminator alone; REPA-E then starts from it."""
    flags = ["--data-dir", image_dir, "--vae-ckpt", folder, *SHORT, "--disc-weight", "0.1"]
    command("train", *flags, "--exp-name", "disc", "--vae-only", "--vae-learning-rate", "0", "--disc-start",
            "0")
    file = tmp_path / "exps/disc/checkpoints/0000004.pt"
    trained, before = load_tensors(file), vae.load_vae(folder)[0].state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained["vae"].items())
    assert vae.load_vae(file)[0].config == vae.load_vae(folder)[0].config
    start = train.build(train.parse_config([str(flag) for flag in [*flags, "--vae-only"]]), CPU).disc
    assert not any(torch.equal(tensor, trained["discriminator"][name]) for name,
                   tensor in start.named_parameters())

    cfg = train.parse_config([str(flag)
                              for flag in [*flags, "--disc-pretrained-ckpt", file, "--num-classes", "2"]])
    assert cfg.disc_start == 0
    disc = train.build(cfg, CPU).disc.state_dict()
    assert all(torch.equal(tensor, trained["discriminator"][name]) for name, tensor in disc.items())

    command("train", *flags[:-1], "0", "--exp-name", "no-disc", "--vae-only")
    without = tmp_path / "exps/no-disc/checkpoints/0000004.pt"
    one_line(command("train", *flags, "--disc-pretrained-ckpt", without, code=2),
             "no discriminator in this checkpoint")
