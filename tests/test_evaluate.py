"""experiments/evaluate.py compared with fid.py and sample.py as commands."""
import json
import shutil
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from conftest import ROOT, run, slow, smooth_images
from data.images import list_images, read_image
from experiments import evaluate
from repa import create_encoder
from sample import load_checkpoint
from support.commands import UserError
from support.files import load_tensors
from support.grids import to_float, to_uint8


@pytest.fixture
def call(monkeypatch, capsys):
    """call(*argv): evaluate.py with these arguments; returns the lines it printed."""
    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
        evaluate.main()
        return capsys.readouterr().out.splitlines()
    return call


@slow
def test_fds_of_a_run_equal_those_of_fid_py(short_run, image_dir, monkeypatch, call, tmp_path):
    """For the same samples and reconstructions; steps that are done are not evaluated again."""
    a = tmp_path / "exps/a"
    shutil.copytree(short_run / "exps/a", a)
    ckpt = a / "checkpoints/0000004.pt"
    saved = load_tensors(ckpt)
    torch.manual_seed(0)                                            # a velocity that is not zero: sampler steps matter
    saved["ema"] = {name: tensor + 0.1 * torch.randn(tensor.shape) if "final_layer" in name else tensor
                    for name, tensor in saved["ema"].items()}
    torch.save(saved, tmp_path / "changed.pt")                      # not into the file that is mapped
    shutil.move(tmp_path / "changed.pt", ckpt)
    monkeypatch.chdir(short_run)
    torch.save(create_encoder("resnet18", random=True)[0].state_dict(), tmp_path / "net.pth")
    network = ["--features", "resnet18", "--features-weights", tmp_path / "net.pth"]
    flags = [a, "--samples", 20, "--num-steps", 2, *network, "--points"]
    call(*flags, 4)
    record = json.loads((a / "fd.json").read_text())

    def fid(*flags):
        run(sys.executable, ROOT / "fid.py", *flags, *network, "--num-workers", 0, "--device", "cpu",
            "--json", tmp_path / "out.json", cwd=short_run)
        return pytest.approx(json.loads((tmp_path / "out.json").read_text())["fd_resnet18"], rel=1e-4)

    sampled = ["--ckpt", ckpt, "--num-samples", 20, "--num-steps", 2, "--mixed-precision", "auto"]
    assert record["fd"]["4"] == fid(image_dir, *sampled, "--metrics", "fid")
    assert record["rfd"] == fid(image_dir, "--ckpt", ckpt, "--reconstruct")
    run(sys.executable, ROOT / "sample.py", *sampled, "--out", tmp_path / "samples.npz", "--device", "cpu",
        cwd=short_run)
    model = load_checkpoint(ckpt)
    x = torch.stack([read_image(file, 32) for file in list_images(image_dir)])
    with torch.no_grad():
        made = to_uint8(model.vae.decode(model.vae.encode(to_float(x)).mean))
    np.savez(tmp_path / "made.npz", arr_0=made.permute(0, 2, 3, 1).numpy())
    assert record["fd_to_reconstructions"] == fid(tmp_path / "made.npz", tmp_path / "samples.npz", "--metrics", "fid")

    (a / "fd.json").unlink()
    (a / "judged.json").write_text(json.dumps(record | dict(fd={"4": 7.0})))        # the old name; not done again
    assert call(*flags, 4)[-1] == f"{a}: 4: 7.0"
    for wrong, words in (((*flags, 4, "--samples", 21), "other settings"), ((*flags, 9), "0000009.pt: no such"),
                         ((a,), "RUN and --points")):
        with pytest.raises(UserError, match=words):
            call(*wrong)


def test_fd_of_features_equals_its_formula():
    a, b = np.random.default_rng(0).random((20, 3)), np.random.default_rng(1).random((30, 3)) ** 2
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real)
    assert evaluate.fd_of_features(*map(torch.tensor, (a, b))) == pytest.approx(expected, rel=1e-6)


@slow
def test_floor_is_the_fd_of_real_images(tmp_path, call):
    """Held-out images like the training images are nearer than others; a part of them is near the rest."""
    lines = {}
    for name, brightness in (("alike", 0), ("other", 120)):
        for part, n, more in (("train", 40, 0), ("val", 8, brightness)):
            (tmp_path / name / part).mkdir(parents=True)
            for k, image in enumerate(smooth_images(n, 32, seed=len(part))):
                Image.fromarray((image // 2 + more).astype(np.uint8)).save(tmp_path / name / part / f"{k:03d}.png")
        lines[name] = call("--floor", tmp_path / name, "--samples", 10)
    titles, values = zip(*(line.split(": ") for line in lines["alike"]))
    assert titles == ("8 held-out images to the 40 training images", "8 training images to the other 32",
                      "10 training images to the other 30")
    near, split, _ = (float(value.split()[0]) for value in values)
    far = float(lines["other"][0].split(": ")[1])
    assert far > 1.2 * near and near == pytest.approx(split, rel=0.5) and lines["other"][1:] == lines["alike"][1:]
