"""experiments/judge.py against fid.py and sample.py as commands."""
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, run, slow, smooth_pictures
from data.images import list_images, read_image
from experiments import judge
from repa import FrozenEncoder
from sample import load_checkpoint
from support.commands import UserError
from support.files import load_tensors
from support.pictures import to_float, to_uint8


def call(monkeypatch, *argv):
    """judge.py with these arguments."""
    monkeypatch.setattr(sys, "argv", ["judge.py", *map(str, argv)])
    judge.main()


@slow
def test_judging_a_run(short_run, pictures, monkeypatch, capsys, tmp_path):
    """Its distances are those of fid.py for the same samples and reconstructions; what is there stays."""
    work = tmp_path / "exps"
    shutil.copytree(short_run / "exps/a", work / "a")
    ckpt = work / "a/checkpoints/0000004.pt"
    saved = load_tensors(ckpt)
    torch.manual_seed(0)                                        # a velocity that is not zero: the sampler's steps count
    saved["ema"] = {name: tensor + 0.1 * torch.randn(tensor.shape) if "final_layer" in name else tensor
                    for name, tensor in saved["ema"].items()}
    torch.save(saved, tmp_path / "changed.pt")                                             # it is read from its file
    shutil.move(tmp_path / "changed.pt", ckpt)
    monkeypatch.chdir(short_run)
    judge_it = [work / "a", "--points", 4, "--samples", 20, "--num-steps", 2, "--features", "resnet18"]
    net = FrozenEncoder("resnet18", random=True)
    torch.save(net.net.state_dict(), tmp_path / "net.pth")
    weights = ["--features-weights", tmp_path / "net.pth"]
    call(monkeypatch, *judge_it, *weights)
    record = json.loads((work / "a/judged.json").read_text())
    with_net = ["--features", "resnet18", *weights, "--num-workers", 0, "--device", "cpu"]

    def fid(*flags):
        run(sys.executable, ROOT / "fid.py", *flags, *with_net, "--json", tmp_path / "out.json", cwd=short_run)
        return json.loads((tmp_path / "out.json").read_text())["fd_resnet18"]

    draw = ["--ckpt", ckpt, "--num-samples", 20, "--num-steps", 2, "--mixed-precision", "auto"]      # as judge.py
    assert record["fd"]["4"] == pytest.approx(fid(pictures, *draw, "--metrics", "fid"), rel=1e-4)
    assert record["rfd"] == pytest.approx(fid(pictures, "--ckpt", ckpt, "--reconstruct"), rel=1e-4)
    run(sys.executable, ROOT / "sample.py", *draw, "--out", tmp_path / "drawn.npz", "--device", "cpu", cwd=short_run)
    model = load_checkpoint(ckpt)
    x = torch.stack([read_image(file, 32) for file in list_images(pictures)])
    with torch.no_grad():
        made = to_uint8(model.vae.decode(model.vae.encode(to_float(x)).mean))
    np.savez(tmp_path / "made.npz", arr_0=made.permute(0, 2, 3, 1).numpy())
    expected = fid(tmp_path / "made.npz", tmp_path / "drawn.npz", "--metrics", "fid")
    assert record["fd_to_reconstructions"] == pytest.approx(expected, rel=1e-4)

    (work / "a/judged.json").write_text(json.dumps(record | dict(fd={"4": 7.0})))             # not done again
    call(monkeypatch, *judge_it, *weights)
    assert json.loads((work / "a/judged.json").read_text())["fd"] == {"4": 7.0}
    with pytest.raises(UserError, match="other settings"):
        call(monkeypatch, *judge_it, "--samples", 21, *weights)
    with pytest.raises(UserError, match="0000009.pt: no such checkpoint"):
        call(monkeypatch, work / "a", "--points", 9, *judge_it[3:], *weights)
    with pytest.raises(UserError, match="RUN and --points"):
        call(monkeypatch, work / "a")


def test_the_judge_on_real_pictures(tmp_path, monkeypatch, capsys):
    """Held-out pictures of the training pictures' kind are nearer than others; a part of them is near the rest."""
    lines = {}
    for name, brightness in (("alike", 0), ("other", 120)):
        for part, n, more in (("train", 40, 0), ("val", 8, brightness)):
            (tmp_path / name / part).mkdir(parents=True)
            for k, picture in enumerate(smooth_pictures(n, 32, seed=len(part))):
                Image.fromarray((picture // 2 + more).astype(np.uint8)).save(tmp_path / name / part / f"{k:03d}.png")
        call(monkeypatch, "--floor", tmp_path / name, "--samples", 10)
        lines[name] = capsys.readouterr().out.splitlines()
    values = {name: [float(line.split(": ")[1].split()[0]) for line in found] for name, found in lines.items()}
    assert lines["alike"][0].startswith("8 held-out pictures to the 40 training pictures: ")
    assert lines["alike"][1].startswith("8 training pictures to the other 32: ")
    assert lines["alike"][2].startswith("10 training pictures to the other 30: ")
    assert values["other"][0] > 1.2 * values["alike"][0] and values["other"][1:] == values["alike"][1:]
    assert values["alike"][0] == pytest.approx(values["alike"][1], rel=0.5)
