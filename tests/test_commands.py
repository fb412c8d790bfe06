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
from conftest import ROOT, SHORT, noise_images, one_line, run, slow
from support.commands import UserError

BAD_COMMANDS = [
    ("train", "--preset huge", "unknown; take one of tiny"),
    ("train", "--model SiT-Q/2", "write SiT-SIZE/PATCH"),
    ("train", "--model SiT-T/3", "does not divide"),
    ("train", "--vae f9d9", "take one of f8d4"),
    ("train", "--enc-type resnet999", "not a timm model"),
    ("train", "--resolution 30", "not divisible by the VAE's stride 4"),
    ("train", "--encoder-depth 9", "there are 6 blocks"),
    ("train", "--batch-size 6 --gradient-accumulation-steps 4", "not divisible by 4"),
    ("train", "--disc-weight 0.1 --resolution 20", "the discriminator needs 24 pixels"),
    ("train", "--vae f16d32 --vae-ckpt good.pt --data-dir few", "good.pt is an f4d8; leave --vae out"),
    ("train", "--cfg-prob 0", "needs label dropout"),
    ("train", "--cfg-scale 0.5", "1 (no guidance) or more"),
    ("train", "--data-dir nowhere", "must be a folder that exists"),
    ("train", "--data-dir empty", "no images in it"),
    ("train", "--data-dir few --num-classes 12", "few has 1"),
    ("train", "--vae-ckpt nowhere.pt --data-dir few", "no such file"),
    ("train", "--posterior-std 0", "must be a number above 0"),
    ("train", "--entropy-weight -1", "must be a number, 0 or more"),
    ("train", "--init-from nowhere.pt", "must be a file or folder that exists"),
    ("train", "--init-from good.pt --data-dir few", "not a training checkpoint"),
    ("train", "--preset sdvae-xl2", "needs --data-dir"),
    ("train", "--preset sdvae-xl2 --data-dir few", "--vae-ckpt FILE, or --vae-from-scratch"),
    ("train", "--no-such-flag", "unrecognized"),
    ("train", "--vae-grad none", "give a trained one by --vae-ckpt"),
    ("train", "--proj-coeff 0", "no alignment for the VAE"),
    ("train", "--vae-only --vae-grad diffusion", "drop it or --vae-grad"),
    ("train", "--cache-latents", "needs a frozen VAE: --vae-grad none"),
    ("train", "--disc-pretrained-ckpt good.pt", "no discriminator with --disc-weight 0"),
    ("train", "--vae-only --vae-learning-rate 0", "trains nothing"),
    ("train", "--eval-samples 3", "at least four"),
    ("train", "--enc-ckpt good.pt --enc-type efficientnet-lite0,resnet18", "the file of one encoder"),
    ("train", "--device abacus", "no such device"),
    ("sample", "", "no checkpoint under exps"),
    ("sample", "--ckpt notes.pt", "not a readable weights file"),
    ("fid", "few", "SAMPLES is missing"),
    ("fid", "few empty", "no images in it"),
    ("fid", "few junk.npz", "not a readable .npz"),
    ("fid", "few few --metrics fdi", "unknown"),
    ("vae", "export good.pt out", "no latent statistics")]


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


def test_batch_is_divided_over_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="not divisible by 3, the processes"):
        train.parse_config(["--batch-size", "32"])


def test_folders_and_packages_that_are_not_there(image_dir, tmp_path, command, monkeypatch):
    flags = ["--data-dir", image_dir, *SHORT]
    one_line(command("train", *flags, "--output-dir", "/proc/x", code=2), "/proc/x")
    monkeypatch.setitem(sys.modules, "wandb", None)                       # as if it were not installed
    one_line(command("train", *flags, "--report-to", "wandb", code=2), "pip install wandb")


# --- The README's -------------------------------------------------------------------------------------------

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
    assert {p.name for p in (exp / "images").iterdir()} == {"samples-0000002.png",
                                                            "reconstructions-0000002.png"}
    out = run(sys.executable, ROOT / "sample.py", "--num-samples", "10", "--num-steps", "2", cwd=tmp_path)
    assert "samples-0000002.png" in out and Image.open(exp / "samples-0000002.png").size[0] > 600
    run(sys.executable, ROOT / "fid.py", "--num-samples", "20", "--num-steps", "2", "--metrics", "fid",
        "--json",
        "out.json", cwd=tmp_path)
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["n_samples"] == 20 and numbers["n_reference"] > 4000
