"""What users hand in: names of runs, output that would replace input, images that are too large, packed data sets."""
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, SHORT, needs, noise_images, one_line, run
from data import images
from experiments import analyze
from support.commands import UserError


@pytest.mark.parametrize("name", ["a/b", "a\\b", "../outside", "..", ".hidden", "/tmp/x", "a/", "C:a", ""])
def test_a_run_has_one_plain_name(name, image_dir, tmp_path, command):
    one_line(command("train", "--data-dir", image_dir, *SHORT, "--exp-name", name, code=2), "--exp-name: must be one")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--save-stats", "--json"])
def test_fid_does_not_overwrite_its_input(flag, image_dir, tmp_path, command):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    before = (tmp_path / "samples.npz").read_bytes()
    out = command("fid", image_dir / "one", "samples.npz", flag, "./samples.npz", code=2)
    one_line(out, "samples.npz: ", "overwrite" if "overwrite" in out else "written over")
    assert (tmp_path / "samples.npz").read_bytes() == before


@pytest.mark.parametrize("words, out", [("reconstruct vae.png photos", "photos/000.png"),
                                        ("reconstruct vae.png photos", "vae.png"),
                                        pytest.param("latents photos vae.png", "vae.png", marks=needs("matplotlib"))])
def test_analyze_does_not_overwrite_its_input(words, out, tmp_path, monkeypatch):
    noise_images(tmp_path / "photos", 1)
    (tmp_path / "vae.png").touch()
    before = (tmp_path / out).read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["analyze.py", *words.split(), "--out", out, "--device", "cpu"])
    with pytest.raises(UserError, match=f"{out}: .*(overwrite|written over)"):
        analyze.main()
    assert Path(out).read_bytes() == before


# --- Images that are too large ------------------------------------------------------------------------------

def test_a_thin_image_is_unreadable_in_one_line(tmp_path):
    """Enlarged to 256 it would have 4 thousand million pixels; one of the same width and 300 rows is read."""
    for name, size in (("thin", (65000, 1)), ("wide", (65000, 300))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    assert images.read_image(tmp_path / "thin.png").shape == (3, 1, 65000)
    assert images.read_image(tmp_path / "wide.png", 256).shape == (3, 256, 256)
    with pytest.raises(UserError, match=r"thin.png: cannot be read \(so thin that it is enlarged to 16640000 x"):
        images.read_image(tmp_path / "thin.png", 256)


def test_the_limit_is_pillows_own():
    """At 256 pixels wide, 89,478,485 pixels are 349,525 rows and a bit: 1365 rows of one pixel, enlarged, not 1366."""
    assert images.center_crop(Image.new("L", (1, 1365)), 256).size == (256, 256)
    with pytest.raises(ValueError, match="so thin"):
        images.center_crop(Image.new("L", (1, 1366)), 256)


def test_bombs_are_one_line_each(tmp_path, image_dir):
    """Above Pillow's warning and above its error: unreadable, and no warning of the library from any process."""
    folder = tmp_path / "data"
    shutil.copytree(image_dir, folder)
    for rows, name in ((9000, "one/big.png"), (18000, "two words/bigger.png")):          # 90 and 180 million pixels
        Image.new("1", (10000, rows)).save(folder / name)
    for i in range(200):
        shutil.copy(image_dir / "one/000.png", folder / f"one/more{i}.png")
    code = ("import sys; from data.images import *; data = ImageFolder(sys.argv[1], 32); known = set()\n"
            "for batch in load_batches(data, [[(i, False)] for i in range(len(data))], 2):\n"
            "    report_unreadable(batch[2], known, len(data))\n")
    out = run(sys.executable, "-c", code, folder, cwd=ROOT)
    assert "big.png: cannot be read (10000 x 9000 pixels, above 89478485)" in out
    assert out.count("skipped an unreadable image") == len(out.splitlines()) == 2


# --- Packed data sets ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["set.zip", "set.tar", "train.parquet", "Set.ZIP"])
def test_a_packed_data_set_names_the_command_that_unpacks_it(name, tmp_path, command):
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / name, tmp_path / "folder" / name):
        file.write_bytes(b"PK")
    for flag in ("--data-dir", "--val-dir"):
        one_line(command("train", *SHORT, flag, name, code=2), "a folder that exists", f"data/unpack.py {name} DIR")
    one_line(command("fid", name, "folder", code=2), f"data/unpack.py {name} DIR")
    one_line(command("fid", "folder", name, code=2), "no images in it", "data/unpack.py folder DIR")
    assert "unpack" not in command("train", *SHORT, "--data-dir", "nowhere", code=2)
