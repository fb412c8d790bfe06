"""data/images.py: pixel formats, folders with odd names and links, labels, order; damaged files."""
import json
import os
import shutil
import struct
import subprocess
import sys
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from conftest import CPU, ROOT, SHORT, losses, metrics_of, noise_pictures, one_line, tiny_config
from data import images
from data.images import (TRIES, ImageFolder, center_crop, list_classes, list_images, load_batches, read_image,
                         several_frames, step_batches)
from support.checkpoints import check_settings, checkpoints
from support.commands import UserError
from support.devices import Processes
from support.files import load_tensors
from support.pictures import to_float

ONE_STEP = [*SHORT, "--max-train-steps", "1"]


def saved_args(folder, run="tiny"):
    return load_tensors(checkpoints(folder / "exps" / run)[-1])["args"]


# --- Pixels -----------------------------------------------------------------------------------------------------------

def rgba(*pixel):
    return Image.new("RGBA", (8, 8), pixel)


def grey16(values, mode="<u2"):
    return Image.fromarray(np.full((8, 8), values, np.dtype(mode)))


def png16(colour_type, samples, trns=b""):
    """An 8x8 PNG of 16 bits a sample, every pixel the same (Pillow writes 16 bits for grey alone)."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    row = b"\0" + struct.pack(f">{len(samples)}H", *samples) * 8
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0))
            + (chunk(b"tRNS", trns) if trns else b"") + chunk(b"IDAT", zlib.compress(row * 8)) + chunk(b"IEND", b""))


def srgb_of_lab(l, a, b):
    """CIE L*a*b* (D50) -> sRGB in 0..255: the formulas of CIE 15 and the Bradford-adapted matrix of sRGB."""
    f = (l + 16) / 116
    xyz = [w * (t ** 3 if t > 6 / 29 else 3 * (6 / 29) ** 2 * (t - 4 / 29))
           for w, t in zip((0.9642, 1.0, 0.8249), (f + a / 500, f, f - b / 200))]
    matrix = [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540],
              [0.0719453, -0.2289914, 1.4052427]]
    linear = [sum(m * v for m, v in zip(row, xyz)) for row in matrix]
    return [255 * (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055) for c in linear]


half = np.zeros((8, 8), np.uint16)
half[:, 4:] = 40000
unit = np.full((8, 8), 0.5, np.float32)
palette = Image.new("P", (8, 8), 1)
palette.putpalette([0, 0, 0, 10, 20, 30])
FORMATS = [                                                # name, image or bytes, what saves it, mean of R, G, B
    ("1.png", Image.new("1", (8, 8), 1), {}, [255] * 3),
    ("L.png", Image.new("L", (8, 8), 100), {}, [100] * 3),
    ("L-trns.png", Image.new("L", (8, 8), 100), dict(transparency=100), [255] * 3),
    ("LA.png", Image.new("LA", (8, 8), (100, 51)), {}, [255 - 155 * 0.2] * 3),
    ("P.png", palette, {}, [10, 20, 30]),
    ("P-trns.png", palette, dict(transparency=1), [255] * 3),
    ("P.gif", palette, {}, [10, 20, 30]),
    ("RGB-trns.png", Image.new("RGB", (8, 8), (1, 2, 3)), dict(transparency=(1, 2, 3)), [255] * 3),
    ("RGBA.png", rgba(200, 100, 0, 51), {}, [255 - 55 * 0.2, 255 - 155 * 0.2, 255 - 255 * 0.2]),
    ("RGBA.webp", rgba(200, 100, 0, 51), dict(lossless=True), [255 - 55 * 0.2, 255 - 155 * 0.2, 255 - 255 * 0.2]),
    ("RGBA.tiff", rgba(200, 100, 0, 51), {}, [255 - 55 * 0.2, 255 - 155 * 0.2, 255 - 255 * 0.2]),
    ("16.png", grey16(32896), {}, [128] * 3),
    ("16-trns.png", Image.fromarray(half), dict(transparency=0), [(255 + 40000 / 257) / 2] * 3),
    ("16-trns-unused.png", Image.fromarray(half), dict(transparency=7), [40000 / 257 / 2] * 3),
    ("16.tiff", grey16(32896), {}, [128] * 3),
    ("16-big-endian.tiff", grey16(32896, ">u2"), {}, [128] * 3),
    ("16-white-is-0.tiff", grey16(12850), dict(tiffinfo={262: 0}), [205] * 3),
    ("I.tiff", grey16(32896, "<i4"), {}, [128] * 3),
    ("16.pgm", grey16(32896), {}, [128] * 3),
    ("RGB16.png", png16(2, (51400, 25700, 0)), {}, [200, 100, 0]),
    ("RGBA16.png", png16(6, (51400, 25700, 0, 13107)), {}, [255 - 55 * 0.2, 255 - 155 * 0.2, 255 - 255 * 0.2]),
    ("LA16.png", png16(4, (25700, 13107)), {}, [255 - 155 * 0.2] * 3),
    ("F-unit.tiff", Image.fromarray(unit), {}, [127.5] * 3),
    ("F-overshoot.tiff", Image.fromarray(unit * 2.1), {}, [255] * 3),
    ("F-255.tiff", Image.fromarray(unit * 200), {}, [100] * 3),
    ("F.pfm", Image.fromarray(unit), {}, [127.5] * 3),
    ("CMYK.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), dict(quality=100), [255, 0, 0]),
    ("CMYK.tiff", Image.new("CMYK", (8, 8), (51, 0, 255, 51)), {}, [204 * 204 / 255, 204, 0]),
    ("YCbCr.jpg", Image.new("RGB", (8, 8), (200, 100, 50)), dict(quality=100), [200, 100, 50]),
    ("YCbCr.tiff", Image.new("YCbCr", (8, 8), (128, 128, 208)), {}, [128 + 1.402 * 80, 128 - 0.714 * 80, 128]),
    ("LAB.tiff", Image.new("LAB", (8, 8), (128, 148, 158)), {}, srgb_of_lab(128 / 2.55, 20, 30)),
    ("RGB.ppm", Image.new("RGB", (8, 8), (200, 100, 50)), {}, [200, 100, 50]),
]


@pytest.mark.parametrize("name, image, how, means", FORMATS, ids=[row[0] for row in FORMATS])
def test_pixels_of_every_format(name, image, how, means, tmp_path):
    if isinstance(image, bytes):
        (tmp_path / name).write_bytes(image)
    else:
        image.save(tmp_path / name, **how)
    for size in (None, 8):
        read = read_image(tmp_path / name, size)
        assert read.dtype == torch.uint8 and read.shape == (3, 8, 8)
        assert read.float().mean((1, 2)).tolist() == pytest.approx(means, abs=1.5)


@pytest.mark.parametrize("values", [np.full((8, 8), 70000, np.int32), np.full((8, 8), -1, np.int32),
                                    np.full((8, 8), 4000, np.float32), np.full((8, 8), np.nan, np.float32)])
def test_grey_values_of_unknown_range_are_refused(values, tmp_path):
    Image.fromarray(values).save(tmp_path / "odd.tiff")
    with pytest.raises(UserError, match="odd.tiff: cannot be read .grey values from"):
        read_image(tmp_path / "odd.tiff")


def test_12_bit_tiff(tmp_path):
    """Pillow reads 12 bits but does not write them: two samples 0x800 in three bytes, in a TIFF made by hand."""
    data = bytes([0x80, 0x08, 0x00] * 32)
    tags = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(data)}
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHIHH", k, 3, 1, v, 0) for k, v in tags.items())
    (tmp_path / "a.tiff").write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + ifd + bytes(4))
    assert read_image(tmp_path / "a.tiff").float().mean().item() == pytest.approx(2048 / 4095 * 255, abs=0.5)


def test_jpegs_are_read_exactly_unless_fast(tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).resize((256, 256), Image.BICUBIC)
    picture.save(tmp_path / "a.jpg", quality=95)
    exact, fast = (read_image(tmp_path / "a.jpg", 64, fast).permute(1, 2, 0).numpy() for fast in (False, True))
    decoded = Image.open(tmp_path / "a.jpg").convert("RGB")
    assert np.array_equal(exact, decoded.resize((128, 128), Image.BOX).resize((64, 64), Image.BOX))
    assert 0.05 < abs(fast.astype(int) - exact).mean() < 10
    small = Image.fromarray(rng.integers(0, 256, (100, 130, 3), np.uint8))
    small.save(tmp_path / "b.jpg")
    assert torch.equal(read_image(tmp_path / "b.jpg", 64), read_image(tmp_path / "b.jpg", 64, fast=True))


def test_exif_does_not_rotate(tmp_path):
    picture, exif = Image.new("RGB", (10, 20), "red"), Image.Exif()
    exif[274] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (3, 20, 10)


def test_center_crop_by_hand():
    """16x8 to 2: box-halved to 8x4 and to 4x2 (both sides still >= 2 * 2), then the middle 2 columns; 8x16 alike."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 3), np.uint8)
    half = np.floor(pixels.reshape(4, 2, 8, 2, 3).mean((1, 3)) + 0.5)
    quarter = np.floor(half.reshape(2, 2, 4, 2, 3).mean((1, 3)) + 0.5)
    for turned in (False, True):
        image = Image.fromarray(pixels.transpose(1, 0, 2) if turned else pixels)
        got = np.array(center_crop(image, 2)).astype(int)
        assert np.abs((got.transpose(1, 0, 2) if turned else got) - quarter[:, 1:3]).max() <= 2


def test_center_crop_ends_bicubic():
    """24 x 30 to 16: nothing to halve, bicubic to 16 x 20, rows 2 to 18."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 24, 3), np.uint8))
    expected = image.resize((16, 20), Image.BICUBIC).crop((0, 2, 16, 18))
    assert np.array_equal(center_crop(image, 16), expected)


# --- Folders ----------------------------------------------------------------------------------------------------------

def test_suffixes(tmp_path):
    pictures = ("png PNG jpg jpeg jpe jfif webp bmp gif tif tiff ppm pgm pbm pnm tga jp2 avif ico qoi mpo dds").split()
    others = "pdf mpg mpeg h5 hdf bufr grib eps ps wmf emf fits txt npy json".split()
    for i, suffix in enumerate(pictures + others):
        (tmp_path / f"{i:02d}.{suffix}").touch()
    (tmp_path / "README").touch()
    (tmp_path / ".hidden.png").touch()
    counts = Counter()
    found = list_images(tmp_path, others=counts)
    assert [path.name.split(".")[1] for path in found] == pictures
    assert counts == Counter({f".{suffix}": 1 for suffix in others} | {"no suffix": 1})


def test_folders_without_images(tmp_path):
    with pytest.raises(UserError, match="no images in it, it is empty"):
        list_images(tmp_path)
    for name in ("a.npz", "b.npz", "c.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="no images in it, 2 of .npz, 1 of .txt"):
        list_images(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        list_images(tmp_path / "nowhere")


def test_links(tmp_path):
    """Links are followed, each path listed; links to nothing, to themselves and up the tree end nothing."""
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "store").mkdir()
    for file in ("data/a/0.png", "store/1.png"):
        (tmp_path / file).touch()
    links = dict(linked="../store", again="../store", up="..", here="a", gone="nowhere", itself="itself")
    for name, target in links.items():
        os.symlink(target, tmp_path / "data" / name)
    links = {"gone.png": "nowhere.png", "itself.png": "itself.png", "file.png": "0.png", "loop": "."}
    for name, target in links.items():
        os.symlink(target, tmp_path / "data/a" / name)
    os.mkfifo(tmp_path / "data/a/pipe.png")                                  # opening it would wait for ever
    found = [str(path.relative_to(tmp_path / "data")) for path in list_images(tmp_path / "data")]
    inside = ["a/0.png", "a/file.png", "again/1.png", "here/0.png", "here/file.png", "linked/1.png"]
    assert [path for path in found if not path.startswith("up/")] == inside
    assert [path for path in found if path.startswith("up/")] == ["up/store/1.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_is_not_passed_over(tmp_path):
    (tmp_path / "0.png").touch()
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(UserError, match="locked: no such folder, or not readable .Permission denied"):
        list_images(tmp_path)


def test_files_that_come_with_old_times_are_seen(tmp_path):
    data = noise_pictures(tmp_path / "data/a", 3).parent
    assert len(ImageFolder(data, 32)) == 3
    times = os.stat(data / "a")
    noise_pictures(data / "a", 8, seed=1)
    os.utime(data / "a", ns=(times.st_atime_ns, times.st_mtime_ns))   # as cp -a and rsync -a leave it
    assert len(ImageFolder(data, 32)) == 8


def test_links_to_nothing_are_left_out(pictures, tmp_path, command, frozen_vae):
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data/one/gone.png").symlink_to(tmp_path / "nowhere.png")
    out = command("train", "--data-dir", tmp_path / "data", *ONE_STEP, "--vae-grad", "none", "--vae-ckpt", frozen_vae,
                  "--cache-latents")
    assert "24 images in 2 classes" in out and "gone" not in out


def test_what_looks_wrong_is_told(pictures, tmp_path, command):
    root = tmp_path / "imagenet"
    for part in ("train", "val"):
        shutil.copytree(pictures, root / part)
    shutil.copy(pictures / "one/000.png", root)
    out = command("train", "--data-dir", root, *ONE_STEP, "--vae-only")
    assert out.count("warning: ") == 2 and f"is {root}/train meant?" in out
    assert f"{root}: 1 images beside the class folders" in out
    out = command("train", "--data-dir", root / "train", "--val-dir", pictures / "one", *ONE_STEP, "--vae-only",
                  "--overwrite")
    assert "warning" not in out  # and pictures to look at need no classes
    for i in range(14):                                               # a folder for each picture
        noise_pictures(tmp_path / f"folders/{i}", 1)
    out = command("train", "--data-dir", tmp_path / "folders", *ONE_STEP, "--vae-only", "--overwrite")
    assert "14 classes for 14 images" in out and "--num-classes" not in out


# --- Items, and their order -------------------------------------------------------------------------------------------

def test_items_are_images_with_labels_and_flips(pictures):
    data = ImageFolder(pictures, 32)
    image, label, bad = data[13, False]
    assert torch.equal(image, read_image(pictures / "two words/001.png", 32)) and (label, bad) == (1, "")
    assert torch.equal(data[13, True][0], image.flip(2)) and data.classes == ["one", "two words"]
    assert [data[i, False][1] for i in (0, 11, 12, 23)] == [0, 0, 1, 1]


def test_order_does_not_depend_on_the_number_of_processes():
    cfg = tiny_config("--flip", "--max-train-steps", "9")

    def order(step, rank, world):
        return list(step_batches(10, cfg, step, rank, world))

    assert order(0, 0, 1) == [a + b for a, b in zip(order(0, 0, 2), order(0, 1, 2))]
    assert order(0, 0, 1)[5:] == order(5, 0, 1)                          # a resumed run sees the same batches
    seen = [i for batch in order(0, 0, 1) for i, _ in batch]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))   # each epoch holds each image once
    assert seen[:10] != seen[10:20] and seen[:10] != sorted(seen[:10])
    assert {flip for batch in order(0, 0, 1) for _, flip in batch} == {True, False}
    other = tiny_config("--flip", "--max-train-steps", "9", "--seed", "2")
    assert [i for batch in step_batches(10, other, 0, 0, 1) for i, _ in batch][:10] != seen[:10]
    cfg.max_train_steps = 500
    assert sum(flip for batch in order(0, 0, 1) for _, flip in batch) / 2000 == pytest.approx(0.5, abs=0.04)
    cfg.flip = False
    assert not any(flip for batch in order(0, 0, 1) for _, flip in batch)


def test_unreadable_images_are_replaced(tmp_path):
    folder = noise_pictures(tmp_path / "it's a \"class\" \u00fc", 3)
    Image.new("RGB", (3, 500)).save(folder / "thin.png")
    (folder / "empty.png").touch()
    Image.new("1", (14000, 14000)).save(folder / "bomb.png")        # 196 million pixels: Pillow refuses it
    data = ImageFolder(tmp_path, 32)
    items = {Path(os.fsdecode(path)).name: data[i, False] for i, path in enumerate(data.files)}
    assert {name for name, (_, _, bad) in items.items() if bad} == {"empty.png", "bomb.png"}
    assert torch.equal(items["bomb.png"][0], items["thin.png"][0])
    assert "/bomb.png: cannot be read" in items["bomb.png"][2]


def test_damaged_images_that_pillow_ends_at_with_other_errors(tmp_path):
    """A GIF cut short in its second frame: IndexError where the frames are counted."""
    frames = [Image.fromarray(np.random.default_rng(k).integers(0, 255, (40, 40), np.uint8)) for k in range(2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    whole = (tmp_path / "a.gif").read_bytes()
    for cut in range(len(whole) // 2 + 9, len(whole), 50):
        (tmp_path / "a.gif").write_bytes(whole[:cut])
        several_frames(tmp_path, [tmp_path / "a.gif"])
        assert read_image(tmp_path / "a.gif").shape == (3, 40, 40)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_goes_away_ends_the_loader_in_one_line(workers, tmp_path, monkeypatch, request):
    """No more than TRIES files are opened, all over the data set: 30 damaged neighbours are not a lost disk."""
    request.addfinalizer(images.end_loaders)
    noise_pictures(tmp_path / "data", 100, size=8)
    for i in range(30):
        (tmp_path / f"data/{i:03d}.png").write_bytes(b"rubbish")
    data = ImageFolder(tmp_path / "data", 8)
    image, _, bad = next(load_batches(data, [[(0, False)]], workers))
    assert "000.png: cannot be read" in bad[0] and image.float().std() > 0
    shutil.rmtree(tmp_path / "data")
    opened = []
    monkeypatch.setattr(images, "read_image", lambda *args, **flags: opened.append(1) or read_image(*args, **flags))
    with pytest.raises(UserError) as e:
        next(load_batches(data, [[(7, False)]], workers))
    line = str(e.value)
    assert line.startswith(f"{tmp_path}/data: none of 20 images tried is readable, the first one {tmp_path}/")
    assert "007.png: cannot be read" in line and len(line.splitlines()) == 1
    assert len(opened) == (TRIES if workers == 0 else 0)              # counted in this process alone


def test_latents_of_a_disk_with_errors_are_not_cached(tmp_path):
    noise_pictures(tmp_path / "data", 100, size=8)
    for name in ("003", "050"):
        (tmp_path / f"data/{name}.png").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="2 of 100 images unreadable"):
        images.cache_latents(ImageFolder(tmp_path / "data", 8), tmp_path / "latents", to_float, 0, Processes())
    assert not (tmp_path / "latents").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the length of a socket's path")
def test_temporary_folders_too_long_for_sockets(pictures, tmp_path):
    """108 bytes with the NUL, of which multiprocessing adds /pymp-12345678/listener-12345678: 75 are left."""
    code = ("import sys; from data.images import ImageFolder, load_batches; from support.commands import run_command\n"
            "run_command(lambda: print(len(list(load_batches(ImageFolder(sys.argv[1], 32), [[(0, False)]], 1)))))")
    for length, word in ((75, "1"), (76, f"error: TMPDIR {tmp_path}")):
        folder = tmp_path / ("x" * (length - len(str(tmp_path)) - 1))
        folder.mkdir()
        done = subprocess.run([sys.executable, "-c", code, pictures], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "TMPDIR": str(folder)}, timeout=120)
        assert (done.stdout + done.stderr).startswith(word) and len((done.stdout + done.stderr).splitlines()) == 1
        assert not any(folder.iterdir())


def test_too_many_unreadable_images_end_the_run(pictures, tmp_path, command):
    shutil.copytree(pictures, tmp_path / "few")
    (tmp_path / "few/one/000.png").write_bytes(b"rubbish")
    out = command("train", "--data-dir", tmp_path / "few", *SHORT, "--vae-only", "--max-train-steps", "20", code=2)
    one_line(out, "of 24 images unreadable", "000.png")


def test_names_that_are_no_utf8(tmp_path, command, frozen_vae):
    """A damaged file of such a name while its latents are cached, and in the run, under an output that is strict."""
    name = b"caf\xe9.png"
    folder = noise_pictures(tmp_path / "data", 120, size=32)
    (folder / os.fsdecode(name)).write_bytes(b"rubbish")
    assert sys.stdout.encoding.lower() == "utf-8" and sys.stdout.errors == "strict"
    out = command("train", "--data-dir", folder, *SHORT, "--batch-size", "121", "--max-train-steps", "1",
                  "--vae-grad", "none", "--cache-latents", "--vae-ckpt", frozen_vae)
    assert "skipped an unreadable image" in out and "caf\\udce9.png" in out and "step 1" in out


# --- Labels -----------------------------------------------------------------------------------------------------------

def test_classes_are_counted_and_remembered(pictures, tmp_path, command):
    """As many labels as the data has; a flag that disagrees is refused; so is other data under the same labels."""
    shutil.copytree(pictures, tmp_path / "data")
    shutil.copytree(pictures / "one", tmp_path / "data/three")
    flags = ["--data-dir", tmp_path / "data", *ONE_STEP]
    one_line(command("train", *flags, "--num-classes", "10", code=2), "--num-classes 10", "has 3")
    assert not list(tmp_path.glob("exps/*/checkpoints"))
    assert "in 3 classes" in command("train", *flags)
    args = saved_args(tmp_path)
    assert args["classes"] == ["one", "three", "two words"] and args["num_classes"] == 3
    model = sample.load_checkpoint(checkpoints(tmp_path / "exps/tiny")[-1])
    assert model.sit.y_embedder.embedding_table.weight.shape[0] == 4 and model.sit.null_class == 3
    resume = [*flags, "--resume", "--max-train-steps", "2"]
    (tmp_path / "data/one").rename(tmp_path / "data/uno")
    one_line(command("train", *resume, code=2), "trained with one as class 0", "that is three")
    (tmp_path / "data/uno").rename(tmp_path / "data/one")
    shutil.copytree(pictures / "one", tmp_path / "data/aardvark")      # sorts first: every label would move
    one_line(command("train", *resume, code=2), "trained with one as class 0", "that is aardvark")
    shutil.rmtree(tmp_path / "data/aardvark")
    command("train", *resume)
    assert [row["step"] for row in losses(tmp_path / "exps/tiny")] == [1, 2]


def test_a_folder_without_classes_is_one_class(pictures, tmp_path, command):
    """Trained without labels, so nothing to guide by, though the tiny preset guides its pictures."""
    folder = pictures / "one"
    out = command("train", "--data-dir", folder, "--val-dir", pictures / "two words", *ONE_STEP, "--cfg-scale", "2.5")
    assert "12 images in 1 classes" in out and metrics_of(tmp_path / "exps/tiny")[0]["train_psnr"] > 0
    args = saved_args(tmp_path)
    assert (args["num_classes"], args["classes"], args["cfg_prob"], args["cfg_scale"]) == (1, ["all"], 0.0, 1.0)
    command("train", "--data-dir", folder, *ONE_STEP, "--cfg-scale", "2.5", "--resume", "--max-train-steps", "2")
    command("sample", "--num-samples", "2", "--num-steps", "2", "--device", "cpu")
    out = command("sample", "--num-samples", "2", "--num-steps", "2", "--device", "cpu", "--cfg-scale", "2", code=2)
    one_line(out, "--cfg-scale above 1", "one class")


def write_table(folder, labels):
    (folder / "dataset.json").write_text(json.dumps(dict(labels=labels)))


def test_dataset_json(tmp_path, command):
    """EDM's and StyleGAN's layout: shard folders are no classes, the table's labels count; `null`: no labels."""
    data = tmp_path / "data"
    for seed, shard in enumerate(("00000", "00001")):
        noise_pictures(data / shard, 4, seed=seed)
    files = [f"{shard}/{i:03d}.png" for shard in ("00000", "00001") for i in range(4)]
    labels = [2, 0, 10, 2, 0, 0, 10, 2]
    write_table(data, [list(pair) for pair in zip(files, labels)])
    found = ImageFolder(data, 32)
    assert found.classes == ["0", "2", "10"]                          # numbers are sorted as numbers
    of = {os.path.relpath(os.fsdecode(f), data): found.classes[k] for f, k in zip(found.files, found.labels)}
    assert of == {file: str(label) for file, label in zip(files, labels)}
    assert "8 images in 3 classes" in command("train", "--data-dir", data, *ONE_STEP, "--vae-only")
    assert saved_args(tmp_path)["classes"] == ["0", "2", "10"]
    write_table(data, None)
    assert "8 images in 1 classes" in command("train", "--data-dir", data, *ONE_STEP, "--vae-only", "--overwrite")
    for text, word in (('{"labels": [["00000/000.png", 1]]}', "00000/001.png"), ('{"pictures": 3}', "labels"),
                       ('{"labels": [["00000/000.png", "cat"]]}', "cat"), ('{"labels": [1, 2]}', "labels"),
                       ("{", "labels"), ("[1, 2]", "labels"), ('{"labels": [["00000/000.png", 1.5]]}', "1.5"),
                       ('{"labels": [["00000/000.png", Infinity]]}', "inf"), ("[" * 100000, "recursion")):
        (data / "dataset.json").write_text(text)
        out = command("train", "--data-dir", data, *ONE_STEP, "--vae-only", "--overwrite", code=2)
        one_line(out, "dataset.json: ", word)


def test_names_that_differ_in_unicode_form_are_one_class(tmp_path, capsys):
    nfc = "\u00e9cole"
    nfd = unicodedata.normalize("NFD", nfc)
    assert nfc != nfd
    for folder, names in (("linux", [nfc]), ("mac", [nfd]), ("both", [nfc, nfd])):
        for name in (*names, "fish"):
            noise_pictures(tmp_path / folder / name, 2, size=8)
        assert {name: len(files) for name, files in list_classes(tmp_path / folder).items()} == {
            "fish": 2, nfc: 2 * len(names)}
        assert list(list_classes(tmp_path / folder)) == ["fish", nfc]
    for old in (nfc, nfd):
        check_settings("1.pt", dict(classes=["fish", old]), {}, (), ["fish", nfc], "data", pytest.fail)
    with pytest.raises(UserError, match="trained with ecole as class 1"):
        check_settings("1.pt", dict(classes=["fish", "ecole"]), {}, (), ["fish", nfc], "data", pytest.fail)
    (tmp_path / "mac" / f"a{nfd}").mkdir()
    with pytest.raises(UserError, match="no images in this class folder"):
        list_classes(tmp_path / "mac")
    write_table(tmp_path / "both", [[f"{name}/{i:03d}.png", k] for i in range(2)
                                    for name, k in ((nfc, 3), (nfd, 4), ("fish", 5))])
    found = list_classes(tmp_path / "both")           # a file's own name first, then another form of it
    assert {k: files[0].parent.name for k, files in found.items()} == {"3": nfc, "4": nfd, "5": "fish"}
    write_table(tmp_path / "linux", [[f"{name}/{i:03d}.png", k] for i in range(2)
                                     for name, k in ((nfd, 4), ("fish", 5))])
    assert {k: files[0].parent.name for k, files in list_classes(tmp_path / "linux").items()} == {"4": nfc, "5": "fish"}


# --- Cached latents ---------------------------------------------------------------------------------------------------

def test_cached_latents(pictures, tmp_path, frozen_vae, monkeypatch, capsys):
    folder = tmp_path / "data"
    shutil.copytree(pictures, folder)
    noise_pictures(folder / "two words", 190)
    (folder / "one/000.png").write_bytes(b"not a picture")
    cfg = tiny_config("--vae-grad", "none", "--vae-ckpt", str(frozen_vae), "--cache-latents", "--data-dir",
                      str(folder), "--output-dir", str(tmp_path))
    m = train.build(cfg, CPU)
    train.wrap(m, cfg, 1)
    monkeypatch.setattr(images, "CHUNK", 10)                             # images in a file

    def cached():
        dataset = ImageFolder(folder, 32)
        train.use_cached_latents(m, cfg, dataset, Processes())
        return Path(dataset.cached)

    where, data = cached(), ImageFolder(folder, 32)
    files = sorted(where.iterdir())
    parts = [torch.load(file, weights_only=True) for file in files]
    rows = torch.cat(parts)
    assert [len(part) for part in parts] == [10] * 20 + [2] and rows.dtype == torch.float16
    assert rows[0].isnan().all() and rows[1:].isfinite().all()
    for i in (1, 23):
        posterior = m.vae.encode(to_float(data[i, False][0][None]))
        assert torch.allclose(rows[i, :8].float(), posterior.mean[0], rtol=1e-3, atol=1e-3)
        assert torch.allclose(rows[i, 8:].float(), posterior.logvar[0], rtol=1e-3, atol=1e-2)

    before, times = files[1].read_bytes(), files[0].stat().st_mtime_ns
    files[1].unlink()                                                   # killed: what is there stays
    assert cached() == where and files[1].read_bytes() == before and files[0].stat().st_mtime_ns == times

    middle = len(before) // 2
    damages = (b"", before[:middle], before[:2000] + bytes(4096) + before[6096:])
    for file, damage in zip(files[1:4], damages):                       # such as a crash of the machine leaves
        file.write_bytes(damage)
    capsys.readouterr()
    assert cached() == where and files[1].read_bytes() == before and files[0].stat().st_mtime_ns == times
    assert torch.equal(torch.cat([torch.load(file, weights_only=True) for file in files])[1:], rows[1:])
    assert f"{where}: 3 damaged files, written again: 000001.pt, 000002.pt, 000003.pt\n" in capsys.readouterr().out

    data.cached, data.with_images = where, False
    image, _, bad, moments = data[0, False]          # 202 // 20 further, as without cache
    assert image.numel() == 0 and torch.equal(moments, rows[10])
    assert "000.png: unreadable when the latents were cached" in bad and f"delete {where}/000000.pt" in bad
    for damage in (b"", before[:middle], bytes(len(before)), None):     # in the middle of a run
        if damage is None:
            torch.save(rows[10:12], files[1])
        else:
            files[1].write_bytes(damage)
        with pytest.raises(UserError, match="000001.pt: these latents cannot be read .*; delete the file"):
            data[15, False]
    files[1].write_bytes(before)
    data.with_images = True
    assert torch.equal(data[5, False][0], ImageFolder(folder, 32)[5, False][0])

    items = [data[i, False] for i in range(1, 5)]
    batch = [torch.stack([i[0] for i in items]), torch.tensor([i[1] for i in items]), [""] * 4]
    fresh = train.run_step(m, cfg, 0, batch, 0, 1)["denoising_loss"].item()
    m = train.build(cfg, CPU)
    train.wrap(m, cfg, 1)
    m.vae.encoder.register_forward_pre_hook(lambda *_: pytest.fail("the VAE ran"))
    again = train.run_step(m, cfg, 0, [*batch, torch.stack([i[3] for i in items])], 0, 1)["denoising_loss"]
    assert again.item() == pytest.approx(fresh, rel=1e-3)               # float16 moments

    m = train.build(cfg, CPU)
    victim = folder / "one/001.png"  # another picture, same name, size and time
    old, pixels = victim.stat(), victim.read_bytes()
    victim.write_bytes(b"\x89PNG" + bytes(len(pixels) - 4))
    os.utime(victim, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (victim.stat().st_size, victim.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    replaced = cached()
    with torch.no_grad():
        m.vae.quant_conv.bias += 1
    other = cached()
    cfg.resolution = 64
    assert len({where, replaced, other, cached()}) == 4                 # another VAE or resolution, another folder
