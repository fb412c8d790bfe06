"""Every command, mistyped: one line, exit code 2, and nothing changed; the README's commands."""
import json
import os
import re
import shlex
import shutil
import sys

import pytest
import torch
from PIL import Image

import train
import vae
from conftest import ROOT, SHORT, losses, noise_pictures, one_line, run, slow
from support.commands import UserError

BAD_COMMANDS = [
    ("train", "--preset huge", "unknown; take one of tiny"),
    ("train", "--model SiT-Q/2", "write SiT-SIZE/PATCH"),
    ("train", "--model SiT-T/3", "does not divide"),
    ("train", "--vae f9d9", "take one of f8d4"),
    ("train", "--enc-type resnet999", "not a timm model"),
    ("train", "--enc-type mocov3-vit-b", "no MoCo-v3 weights"),
    ("train", "--resolution 30", "not divisible by the VAE's stride 4"),
    ("train", "--resolution zero", "must be a whole number above 0"),
    ("train", "--encoder-depth 9", "has blocks 1 to 6"),
    ("train", "--batch-size 0", "must be a whole number above 0"),
    ("train", "--batch-size 6 --gradient-accumulation-steps 4", "not divisible by 4"),
    ("train", "--ema-decay 1", "must be a number in [0, 1), below 1"),
    ("train", "--bn-momentum 0", "must be a number in (0, 1], above 0"),
    ("train", "--disc-weight 0.1 --resolution 20", "the discriminator, which needs 24 pixels"),
    ("train", "--vae f16d32 --vae-ckpt good.pt --data-dir few", "good.pt is an f4d8; leave --vae out"),
    ("train", "--cfg-prob nan", "must be a number in [0, 1]"),
    ("train", "--cfg-prob 0", "needs labels dropped"),
    ("train", "--seed -1", "from 0 to 2^64 - 1"),
    ("train", "--seed 18446744073709551616", "from 0 to 2^64 - 1"),
    ("train", "--learning-rate nan", "must be a number above 0"),
    ("train", "--learning-rate inf", "must be a number above 0"),
    ("train", "--kl-weight -1", "must be a number, 0 or more"),
    ("train", "--data-dir nowhere", "must be a folder that exists"),
    ("train", "--data-dir notes.pt", "must be a folder that exists"),
    ("train", "--data-dir empty", "no images in it"),
    ("train", "--data-dir hollow", "no images in it"),
    ("train", "--data-dir few --num-classes 12", "few has 1"),
    ("train", "--val-dir nowhere", "must be a folder that exists"),
    ("train", "--vae-ckpt nowhere.pt --data-dir few", "no such file"),
    ("train", "--init-from nowhere.pt", "must be a file or folder that exists"),
    ("train", "--init-from good.pt --data-dir few", "not a training checkpoint"),
    ("train", "--vae-ckpt notes.pt --data-dir few", "not a readable weights file"),
    ("train", "--vae-ckpt other.pt --data-dir few", "no VAEs in it"),
    ("train", "--preset sdvae-xl2", "needs --data-dir"),
    ("train", "--preset sdvae-xl2 --data-dir few", "--vae-ckpt FILE, or --vae-from-scratch"),
    ("train", "--mixed-precision fp16", "invalid choice"),
    ("train", "--no-such-flag", "unrecognized"),
    ("train", "--resume --overwrite", "exclude each other"),
    ("train", "--vae-grad none", "give a trained one by --vae-ckpt"),
    ("train", "--vae-grad none --vae-ckpt other.pt --data-dir few", "no VAEs in it"),
    ("train", "--proj-coeff 0", "no alignment for the VAE"),
    ("train", "--vae-only --vae-grad diffusion", "drop it or --vae-grad"),
    ("train", "--cache-latents", "latents that stay"),
    ("train", "--cache-latents --flip --vae-grad none --vae-ckpt good.pt", "no --flip"),
    ("train", "--device abacus", "no such device"),
    ("sample", "", "no checkpoint under exps"),
    ("sample", "--ckpt notes.pt", "not a readable weights file"),
    ("sample", "--ckpt other.pt", "not a training checkpoint"),
    ("sample", "--ckpt evil.pt", "refused"),
    ("sample", "--mode euler", "invalid choice"),
    ("fid", "few", "SAMPLES is missing"),
    ("fid", "few nowhere", "must be a file or folder that exists"),
    ("fid", "few empty", "no images in it"),
    ("fid", "few junk.npz", "not a readable .npz"),
    ("fid", "few few --metrics fdi", "unknown"),
    ("fid", "few few --features vit_of_no_one", "not a timm model"),
    ("fid", "few few --batch-size 0", "must be a whole number above 0"),
    ("vae", "export notes.pt out", "not a readable weights file"),
    ("vae", "export good.pt out", "no latent statistics"),
    ("vae", "export other.pt out", "no VAEs in it"),
    ("vae", "polish good.pt", "invalid choice")]


@pytest.fixture(scope="session")
def bad_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name in ("empty", "few/a", "hollow/a"):
        (folder / name).mkdir(parents=True)
    noise_pictures(folder / "few/a", 2)
    (folder / "notes.pt").write_text("hello")
    (folder / "junk.npz").write_bytes(b"PK junk")
    torch.save({"weights": torch.zeros(3)}, folder / "other.pt")
    torch.save({"model": Evil()}, folder / "evil.pt")
    torch.save(vae.AutoencoderKL("f4d8").state_dict(), folder / "good.pt")
    return folder


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("script, flags, message", BAD_COMMANDS)
def test_bad_commands_end_in_one_line(script, flags, message, bad_folder, command):
    def contents():
        return sorted((str(p), p.stat().st_size) for p in bad_folder.rglob("*"))

    before = contents()
    one_line(command(script, *flags.split(), cwd=bad_folder, code=2), message)
    if (bad_folder / "exps").exists():  # an empty run's folder with its lock at most
        assert all(p.name == ".lock" for p in (bad_folder / "exps").rglob("*") if p.is_file())
        shutil.rmtree(bad_folder / "exps")
    assert contents() == before


def test_batch_must_divide_over_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="not divisible by 3, the processes"):
        train.parse_config(["--batch-size", "32"])


def test_surroundings(pictures, tmp_path, command, monkeypatch):
    flags = ["--data-dir", pictures, *SHORT, "--vae-only", "--max-train-steps", "1"]
    one_line(command("train", *flags, "--output-dir", "/proc/x", code=2), "/proc/x")
    (tmp_path / "a file").touch()
    one_line(command("train", *flags, "--output-dir", "a file", code=2), "a file")
    with monkeypatch.context() as patch:
        patch.setattr(train, "build", lambda *args: pytest.fail("it was built first"))
        for package in ("wandb", "tensorboard"):
            patch.setitem(sys.modules, package, None)                 # as if it were not installed
            one_line(command("train", *flags, "--report-to", package, code=2), f"pip install {package}")
    monkeypatch.setenv("WORLD_SIZE", "1")                             # by a platform, with nothing beside it
    command("train", *flags)
    assert len(losses(tmp_path / "exps/tiny")) == 1


# --- The README's -----------------------------------------------------------------------------------------------------

def readme_commands():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.sub(r"\s#.*", "", line).split("&&")]
    return [shlex.split(p) for p in parts if re.search(r"\b(train|sample|fid|vae)\.py", p)]


def test_readme_flags_exist(command):
    commands, helps, scripts = readme_commands(), {}, ("train.py", "sample.py", "fid.py", "vae.py")
    assert len(commands) >= 6
    for words in commands:
        script = next(w for w in words if w in scripts)
        words = words[words.index(script) + 1:]
        key = (script.removesuffix(".py"), *(words[:1] if script == "vae.py" else []))
        if key not in helps:
            helps[key] = command(*key, "--help")
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in re.findall(r"--[\w-]+", helps[key]), (key, word)


@slow
def test_readme_commands_on_what_is_drawn(tmp_path):
    """The first commands, their steps cut down: drawing the data, training, sampling, evaluating."""
    run(sys.executable, ROOT / "train.py", "--max-train-steps", "2", "--log-steps", "1", "--batch-size", "8",
        cwd=tmp_path)
    exp = tmp_path / "exps/tiny"
    assert {p.name for p in (exp / "pictures").iterdir()} == {"samples-0000002.png", "reconstructions-0000002.png"}
    assert json.loads((exp / "args.json").read_text())["model"] == "SiT-T/2"
    out = run(sys.executable, ROOT / "sample.py", "--num-samples", "10", "--num-steps", "2", cwd=tmp_path)
    assert "samples-0000002.png" in out and Image.open(exp / "samples-0000002.png").size[0] > 600
    run(sys.executable, ROOT / "fid.py", "--num-samples", "20", "--num-steps", "2", "--metrics", "fid", "--json",
        "out.json", cwd=tmp_path)
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["n_samples"] == 20 and numbers["n_reference"] > 4000
