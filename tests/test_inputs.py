"""What users hand in: output that would replace input, images that are too large, packed data sets."""
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, SHORT, noise_images, one_line, run
from data import images
from experiments import analyze
from support.commands import UserError


def test_fid_does_not_overwrite_its_input(image_dir, tmp_path, command):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    before = (tmp_path / "samples.npz").read_bytes()
    for flag in ("--save-stats", "--json"):
        one_line(command("fid", image_dir / "one", "samples.npz", flag, "./samples.npz", code=2), "overwrite")
    assert (tmp_path / "samples.npz").read_bytes() == before


def test_analyze_does_not_overwrite_its_input(tmp_path, call):
    photos = noise_images(tmp_path / "photos", 1)
    with pytest.raises(UserError, match="photos/000.png: refusing to overwrite"):
        call(analyze.main, "reconstruct", "vae.pt", photos, "--out", photos / "000.png")


# --- Images that are too large ------------------------------------------------------------------------------

def test_thin_image_is_unreadable_in_one_line(tmp_path):
    """Enlarged to 256 it would have 4 thousand million pixels; one of the same width and 300 rows is read."""
    for name, size in (("thin", (65000, 1)), ("wide", (65000, 300))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    assert images.read_image(tmp_path / "wide.png", 256).shape == (3, 256, 256)
    with pytest.raises(UserError,
                       match=r"thin.png: cannot be read \(so thin that it is enlarged to 16640000 x"):
        images.read_image(tmp_path / "thin.png", 256)


def test_bombs_are_one_line_each(tmp_path, image_dir):
    """Above Pillow's warning and above its error: unreadable, and no warning of the library from any
    process."""
    folder = tmp_path / "data"
    shutil.copytree(image_dir, folder)
    for rows, name in ((9000, "one/big.png"), (18000, "two words/bigger.png")):    # 90 and 180 million pixels
        Image.new("1", (10000, rows)).save(folder / name)
    for i in range(200):
        shutil.copy(image_dir / "one/000.png", folder / f"one/more{i}.png")
    code = ("import sys; from data.images import *; data = ImageFolder(sys.argv[1], 32); known = set()\n"
            "for batch in load_batches(data, [[i] for i in range(len(data))], 2):\n"
            "    report_unreadable(batch[2], known, len(data))\n")
    out = run(sys.executable, "-c", code, folder, cwd=ROOT)
    assert "big.png: cannot be read (10000 x 9000 pixels, above 89478485)" in out
    assert out.count("skipped an unreadable image") == len(out.splitlines()) == 2


# --- Packed data sets ---------------------------------------------------------------------------------------

def test_packed_data_set_names_the_command_that_unpacks_it(tmp_path, command):
    (tmp_path / "folder").mkdir()
    for file in ("Set.ZIP", "folder/train.parquet"):
        (tmp_path / file).write_bytes(b"PK")
    for flag in ("--data-dir", "--val-dir"):
        one_line(command("train", *SHORT, flag, "Set.ZIP", code=2), "data/unpack.py Set.ZIP DIR")
    one_line(command("fid", "Set.ZIP", "folder", code=2), "data/unpack.py Set.ZIP DIR")
    one_line(command("fid", "folder", "Set.ZIP", code=2), "no images in it", "data/unpack.py folder DIR")
