"""Every command, mistyped: one line, exit code 2, and nothing changed; the README's commands."""
import json
import re
import shlex
import shutil
import sys

import pytest
import torch
from PIL import Image

import train
import vae
from conftest import ROOT, SHORT, losses, noise_images, one_line, run, slow
from support.commands import UserError

BAD_COMMANDS = [
    ("train", "--preset huge", "unknown; take one of tiny"),
    ("train", "--model SiT-Q/2", "write SiT-SIZE/PATCH"),
    ("train", "--model SiT-T/3", "does not divide"),
    ("train", "--vae f9d9", "take one of f8d4"),
    ("train", "--enc-type resnet999", "not a timm model"),
    ("train", "--enc-type mocov3-vit-b", "no MoCo-v3 weights"),
    ("train", "--resolution 30", "not divisible by the VAE's stride 4"),
    ("train", "--seed -1", "must be a whole number from 0 to 2^64-1"),
    ("train", "--encoder-depth 9", "there are 6 blocks"),
    ("train", "--batch-size 0", "must be a whole number above 0"),
    ("train", "--batch-size 6 --gradient-accumulation-steps 4", "not divisible by 4"),
    ("train", "--ema-decay 1", "must be a number in [0, 1)"),
    ("train", "--bn-momentum 0", "must be a number in (0, 1]"),
    ("train", "--disc-weight 0.1 --resolution 20", "the discriminator needs 24 pixels"),
    ("train", "--vae f16d32 --vae-ckpt good.pt --data-dir few", "good.pt is an f4d8; leave --vae out"),
    ("train", "--cfg-prob 0", "needs label dropout"),
    ("train", "--data-dir nowhere", "must be a folder that exists"),
    ("train", "--data-dir empty", "no images in it"),
    ("train", "--data-dir few --num-classes 12", "few has 1"),
    ("train", "--vae-ckpt nowhere.pt --data-dir few", "no such file"),
    ("train", "--init-from nowhere.pt", "must be a file or folder that exists"),
    ("train", "--init-from good.pt --data-dir few", "not a training checkpoint"),
    ("train", "--vae-ckpt notes.pt --data-dir few", "not a readable weights file"),
    ("train", "--vae-ckpt other.pt --data-dir few", "no VAEs in it"),
    ("train", "--preset sdvae-xl2", "needs --data-dir"),
    ("train", "--preset sdvae-xl2 --data-dir few", "--vae-ckpt FILE, or --vae-from-scratch"),
    ("train", "--mixed-precision fp16", "invalid choice"),
    ("train", "--no-such-flag", "unrecognized"),
    ("train", "--vae-grad none", "give a trained one by --vae-ckpt"),
    ("train", "--proj-coeff 0", "no alignment for the VAE"),
    ("train", "--vae-only --vae-grad diffusion", "drop it or --vae-grad"),
    ("train", "--cache-latents", "latents that do not change"),
    ("train", "--cache-latents --flip --vae-grad none --vae-ckpt good.pt", "no --flip"),
    ("train", "--device abacus", "no such device"),
    ("sample", "", "no checkpoint under exps"),
    ("sample", "--ckpt notes.pt", "not a readable weights file"),
    ("sample", "--ckpt other.pt", "not a training checkpoint"),
    ("fid", "few", "SAMPLES is missing"),
    ("fid", "few nowhere", "must be a file or folder that exists"),
    ("fid", "few empty", "no images in it"),
    ("fid", "few junk.npz", "not a readable .npz"),
    ("fid", "few few --metrics fdi", "unknown"),
    ("fid", "few few --features vit_of_no_one", "not a timm model"),
    ("vae", "export good.pt out", "no latent statistics"),
    ("vae", "polish good.pt", "invalid choice")]


@pytest.fixture(scope="session")
def bad_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    noise_images(folder / "few/a", 2)
    (folder / "notes.pt").write_text("hello")
    (folder / "junk.npz").write_bytes(b"PK junk")
    torch.save({"weights": torch.zeros(3)}, folder / "other.pt")
    torch.save(vae.AutoencoderKL("f4d8").state_dict(), folder / "good.pt")
    return folder


@pytest.mark.parametrize("script, flags, message", BAD_COMMANDS)
def test_bad_commands_end_in_one_line(script, flags, message, bad_folder, command):
    def contents():
        return sorted((str(p), p.stat().st_size) for p in bad_folder.rglob("*"))

    before = contents()
    one_line(command(script, *flags.split(), cwd=bad_folder, code=2), message)
    if (bad_folder / "exps").exists():                                # at most a run's folder with its lock
        assert all(p.name == ".lock" for p in (bad_folder / "exps").rglob("*") if p.is_file())
        shutil.rmtree(bad_folder / "exps")
    assert contents() == before


def test_the_batch_is_divided_over_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="not divisible by 3, the processes"):
        train.parse_config(["--batch-size", "32"])


def test_folders_packages_and_platforms(image_dir, tmp_path, command, monkeypatch):
    flags = ["--data-dir", image_dir, *SHORT, "--vae-only", "--max-train-steps", "1"]
    (tmp_path / "a file").touch()
    for folder in ("/proc/x", "a file"):
        one_line(command("train", *flags, "--output-dir", folder, code=2), folder)
    for package in ("wandb", "tensorboard"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)                 # as if it were not installed
            one_line(command("train", *flags, "--report-to", package, code=2), f"pip install {package}")
    monkeypatch.setenv("WORLD_SIZE", "1")                             # by a platform, without a group
    command("train", *flags)
    assert len(losses(tmp_path / "exps/tiny")) == 1


# --- The README's -----------------------------------------------------------------------------------------------------

def test_flags_in_the_readme_exist(command):
    text = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    helps, found = {}, 0
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.sub(r"\s#.*", "", line).split("&&"):
            script = re.search(r"\b(train|sample|fid|vae)\.py (.*)", part)
            if not script:
                continue
            words, found = shlex.split(script[2]), found + 1
            key = (script[1], *(words[:1] if script[1] == "vae" else []))
            if key not in helps:
                helps[key] = re.findall(r"--[\w-]+", command(*key, "--help"))
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert flags <= set(helps[key]), part
    assert found >= 5


@slow
def test_first_commands_of_the_readme(tmp_path):
    """Their steps cut down: rendering the data, training, sampling, evaluating."""
    run(sys.executable, ROOT / "train.py", "--max-train-steps", "2", "--log-steps", "1", "--batch-size", "8",
        cwd=tmp_path)
    exp = tmp_path / "exps/tiny"
    assert {p.name for p in (exp / "images").iterdir()} == {"samples-0000002.png", "reconstructions-0000002.png"}
    out = run(sys.executable, ROOT / "sample.py", "--num-samples", "10", "--num-steps", "2", cwd=tmp_path)
    assert "samples-0000002.png" in out and Image.open(exp / "samples-0000002.png").size[0] > 600
    run(sys.executable, ROOT / "fid.py", "--num-samples", "20", "--num-steps", "2", "--metrics", "fid", "--json",
        "out.json", cwd=tmp_path)
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["n_samples"] == 20 and numbers["n_reference"] > 4000
