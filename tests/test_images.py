"""data/images.py and data/latents.py: pixels, folders, labels, the order of items, damaged files, cached
latents."""
import json
import os
import shutil
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CPU, ROOT, SHORT, noise_images, one_line, run, tiny_config
from data import images, latents
from data.images import ImageFolder, center_crop, list_classes, list_images, read_image, step_batches
from support.checkpoints import checkpoints
from support.commands import UserError
from support.devices import Processes
from support.files import load_tensors
from vae import AutoencoderKL

ONE_STEP = [*SHORT, "--max-train-steps", "1"]


# --- Pixels -------------------------------------------------------------------------------------------------

def grey16(value, mode="<u2"):
    return Image.fromarray(np.full((8, 8), value, np.dtype(mode)))


def grey_float(value):
    return Image.fromarray(np.full((8, 8), value, np.float32))


half = np.zeros((8, 8), np.uint16)
half[:, 4:] = 40000
palette = Image.new("P", (8, 8), 1)
palette.putpalette([0, 0, 0, 10, 20, 30])
rgba = Image.new("RGBA", (8, 8), (200, 100, 0, 51))
frames = dict(save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
FORMATS = [                                           # name, image, what saves it, expected mean of R, G, B
    ("1.png", Image.new("1", (8, 8), 1), {}, [255] * 3),
    ("P.gif", palette, {}, [10, 20, 30]),
    ("P-transparent.png", palette, dict(transparency=1), [255] * 3),
    ("RGB-transparent.png", Image.new("RGB", (8, 8), (1, 2, 3)), dict(transparency=(1, 2, 3)), [255] * 3),
    ("RGBA.png", rgba, {}, [255 - 55 * 0.2, 255 - 155 * 0.2, 255 - 255 * 0.2]),
    ("16.png", grey16(32896), {}, [128] * 3),
    ("16-transparent.png", Image.fromarray(half), dict(transparency=0), [(255 + 40000 / 257) / 2] * 3),
    ("16-white-is-0.tiff", grey16(12850), dict(tiffinfo={262: 0}), [205] * 3),
    ("F-overshoot.tiff", grey_float(1.05), {}, [255] * 3),
    ("F-255.tiff", grey_float(100), {}, [100] * 3),
    ("CMYK.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), dict(quality=100), [255, 0, 0]),
    ("frames.gif", Image.new("RGB", (8, 8), "red"), frames, [255, 0, 0]),
]


@pytest.mark.parametrize("name, image, how, means", FORMATS, ids=[row[0] for row in FORMATS])
def test_pixels_of_every_format(name, image, how, means, tmp_path):
    image.save(tmp_path / name, **how)
    for size in (None, 8):
        read = read_image(tmp_path / name, size)
        assert read.dtype == torch.uint8 and read.shape == (3, 8, 8)
        assert read.float().mean((1, 2)).tolist() == pytest.approx(means, abs=1.5)


@pytest.mark.parametrize("image", [grey16(70000, "<i4"), grey_float(np.nan)])
def test_grey_values_of_unknown_range_are_refused(image, tmp_path):
    image.save(tmp_path / "odd.tiff")
    with pytest.raises(UserError, match="odd.tiff: cannot be read .grey values from"):
        read_image(tmp_path / "odd.tiff")


def test_jpegs_are_read_exactly_unless_fast(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    image.resize((256, 256), Image.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    exact, fast = (read_image(tmp_path / "a.jpg", 64, fast).permute(1, 2, 0).numpy()
                   for fast in (False, True))
    decoded = Image.open(tmp_path / "a.jpg").convert("RGB")
    assert np.array_equal(exact, decoded.resize((128, 128), Image.BOX).resize((64, 64), Image.BOX))
    assert 0.05 < abs(fast.astype(int) - exact).mean() < 10


def test_exif_does_not_rotate(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (10, 20), "red").save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (3, 20, 10)


def test_center_crop():
    """16x8 to 2: box-halved to 8x4 and to 4x2 (both sides still >= 2 * 2), then the middle 2 columns; 24x30
    to 16: nothing to halve, bicubic to 16x20, rows 2 to 18."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (8, 16, 3), np.uint8)
    halved = np.floor(pixels.reshape(4, 2, 8, 2, 3).mean((1, 3)) + 0.5)
    quarter = np.floor(halved.reshape(2, 2, 4, 2, 3).mean((1, 3)) + 0.5)
    assert np.abs(np.array(center_crop(Image.fromarray(pixels), 2)) - quarter[:, 1:3]).max() <= 2
    image = Image.fromarray(rng.integers(0, 255, (30, 24, 3), np.uint8))
    expected = np.array(image.resize((16, 20), Image.BICUBIC))[2:18]
    assert np.array_equal(center_crop(image, 16), expected)


# --- Folders ------------------------------------------------------------------------------------------------

def test_suffixes_of_images(tmp_path):
    for name in ("0.png", "1.JPG", "2.webp", "3.npz", "4.npz", "5.txt", "README", ".hidden.png"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["0.png", "1.JPG", "2.webp"]
    for name in ("0.png", "1.JPG", "2.webp"):
        (tmp_path / name).unlink()
    for folder, words in ((tmp_path, "no images in it, 2 of .npz, 1 of .txt"),
                          (tmp_path / "x", "no such folder")):
        with pytest.raises(UserError, match=words):
            list_images(folder)


def test_files_are_sorted_and_links_followed(tmp_path):
    """By the parts of their paths; each folder is read once; links to nothing, to themselves and up the tree
    are no harm."""
    names = ["a/b/0.png", "a/b.png", "a b/0.png", "a-b/0.png", "a.png", "B.png"]
    for name in (*(f"data/{name}" for name in names), "store/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    links = {"linked": "../store", "zagain": "../store", "up": "..", "itself": "itself", "gone": "nowhere",
             "a/gone.png": "nowhere.png", "a/file.png": "b.png", "a/loop": "."}
    for name, target in links.items():
        os.symlink(target, tmp_path / "data" / name)
    os.mkfifo(tmp_path / "data/a/pipe.png")                                  # opening it would wait for ever
    found = [path.relative_to(tmp_path / "data").parts for path in list_images(tmp_path / "data")]
    assert found == sorted(tuple(name.split("/")) for name in (*names, "a/file.png", "linked/1.png"))


def test_suspicious_folders_are_warned_of(image_dir, tmp_path, capsys):
    for part in ("train", "val"):
        shutil.copytree(image_dir, tmp_path / part)
    shutil.copy(image_dir / "one/000.png", tmp_path)
    assert list(list_classes(tmp_path)) == ["train", "val"]
    out = capsys.readouterr().out
    assert f"is {tmp_path}/train meant?" in out and f"{tmp_path}: 1 images outside of the class folders" in out
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no images in this class folder"):
        list_classes(tmp_path)


# --- Items, and their order ---------------------------------------------------------------------------------

def test_items_are_images_with_labels(image_dir):
    data = ImageFolder(image_dir, 32)
    image, label, error = data[13]
    assert torch.equal(image, read_image(image_dir / "two words/001.png", 32)) and (label, error) == (1, "")
    assert data.classes == ["one", "two words"]
    assert [data[i][1] for i in (0, 11, 12, 23)] == [0, 0, 1, 1]
    (some, of_some), (everything, labels) = data.some(16), data.some(256)
    assert torch.equal(some, everything[:16]) and len(everything) == 24
    assert 4 <= of_some.sum() <= 11                                          # of all classes
    for k in (0, 1):
        images_of_k = torch.stack([data[i][0] for i in range(12 * k, 12 * k + 12)])
        assert torch.equal(everything[labels == k].sum(), images_of_k.sum())


def test_order_does_not_depend_on_the_number_of_processes():
    cfg = tiny_config("--max-train-steps", "500")

    def order(step=0, rank=0, world=1):
        return list(step_batches(10, cfg, step, rank, world))

    batches = order()
    assert batches == [a + b for a, b in zip(order(0, 0, 2), order(0, 1, 2), strict=True)]
    assert batches[5:] == order(5)                                       # a resumed run sees the same batches
    seen = sum(batches, [])
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))       # each epoch has each image once
    assert seen[:10] != seen[10:20]
    assert batches[0] == [5, 0, 3, 2]                                   # as ever: old runs resume exactly
    cfg.seed = 2
    assert sum(order(), [])[:10] != seen[:10]


def test_unreadable_images_are_replaced(tmp_path):
    folder = noise_images(tmp_path / "it's a \"class\" \u00fc", 3)
    Image.new("RGB", (3, 500)).save(folder / "thin.png")
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"rubbish")                       # no UTF-8
    Image.new("1", (14000, 14000)).save(folder / "bomb.png")        # 196 million pixels: Pillow refuses it
    data = ImageFolder(tmp_path, 32)
    items = {Path(os.fsdecode(path)).name: data[i] for i, path in enumerate(data.files)}
    assert {name for name, (_, _, error) in items.items() if error} == {"caf\udce9.png", "bomb.png"}
    assert torch.equal(items["caf\udce9.png"][0], items["thin.png"][0])      # the next readable one
    assert "/bomb.png: cannot be read" in items["bomb.png"][2]


def test_program_that_fails_ends_its_loader_processes(tmp_path):
    """They ignore the signal by which Python would end them at its exit: it would wait for ever."""
    noise_images(tmp_path, 4)
    code = ("from data.images import ImageFolder, load_batches\n"
            "batches = load_batches(ImageFolder('.', 8), [[i] for i in range(4)], 1)\n"
            "next(batches)\nraise ValueError('stop')")
    assert "ValueError: stop" in run(sys.executable, "-c", code, cwd=tmp_path, code=1, timeout=60)


def test_lost_disk_is_one_line(tmp_path, monkeypatch):
    """20 files all over the data set are tried: 30 damaged neighbours are not a lost disk."""
    noise_images(tmp_path / "data", 100, size=8)
    for i in range(30):
        (tmp_path / f"data/{i:03d}.png").write_bytes(b"rubbish")
    data, opened = ImageFolder(tmp_path / "data", 8), []
    image, _, error = data[0]
    assert "000.png: cannot be read" in error and image.float().std() > 0
    shutil.rmtree(tmp_path / "data")
    monkeypatch.setattr(images, "read_image", lambda *args,
                        **flags: opened.append(1) or read_image(*args, **flags))
    with pytest.raises(UserError,
                       match="none of 20 images tried is readable, the first one .*007.png: cannot be"):
        data[7]
    assert len(opened) == 20


@pytest.mark.skipif(sys.platform != "linux", reason="the length of a socket's path")
def test_temporary_folder_too_long_for_sockets(image_dir, tmp_path):
    """108 bytes with the NUL, of which multiprocessing adds /pymp-12345678/listener-12345678: 75 are left."""
    code = ("import sys; from data.images import ImageFolder, load_batches; from support.commands import run_command\n"
            "run_command(lambda: print(len(list(load_batches(ImageFolder(sys.argv[1], 32), [[0]], 1)))))")
    folder = tmp_path / ("x" * (76 - len(str(tmp_path)) - 1))
    folder.mkdir()
    out = run(sys.executable, "-c", code, image_dir, cwd=ROOT, env={"TMPDIR": str(folder)}, code=2)
    one_line(out, f"error: TMPDIR {tmp_path}", "--num-workers 0")


def test_more_than_1_percent_of_unreadable_images_end_the_run(capsys):
    known = set()
    for _ in range(2):
        images.report_unreadable(["", "a.png: x", ""], known, 100)
    assert capsys.readouterr().out == "skipped an unreadable image: a.png: x\n"          # once
    with pytest.raises(UserError, match="2 of 100 images unreadable, the last one b.png: y"):
        images.report_unreadable(["b.png: y"], known, 100)


# --- Labels -------------------------------------------------------------------------------------------------

def saved_args(folder):
    return load_tensors(checkpoints(folder / "exps/tiny")[-1])["args"]


def test_classes_are_counted_and_remembered(image_dir, tmp_path, command):
    """As many labels as the data has; a flag that disagrees is refused; so is other data under the same
    labels."""
    shutil.copytree(image_dir, tmp_path / "data")
    flags = ["--data-dir", tmp_path / "data", *ONE_STEP]
    one_line(command("train", *flags, "--num-classes", "10", code=2), "--num-classes 10", "has 2")
    assert not list(tmp_path.glob("exps/*/checkpoints"))
    assert "in 2 classes" in command("train", *flags)
    args = saved_args(tmp_path)
    assert args["classes"] == ["one", "two words"] and args["num_classes"] == 2
    shutil.copytree(image_dir / "one", tmp_path / "data/aardvark")      # sorts first: every label would move
    out = command("train", *flags, "--resume", "--max-train-steps", "2", code=2)
    one_line(out, "trained with one as class 0", "that is aardvark")


def test_folder_without_classes_is_one_class(image_dir, tmp_path, command):
    """Trained without labels, so nothing to guide by, though the tiny preset guides its sample grids."""
    flags = ["--data-dir", image_dir / "one", *SHORT, "--cfg-scale", "2.5"]
    assert "12 images in 1 classes" in command("train", *flags, "--max-train-steps", "1")
    args = saved_args(tmp_path)
    assert (args["num_classes"], args["classes"], args["cfg_prob"], args["cfg_scale"]) == (1, ["all"], 0.0,
                                                                                           1.0)
    command("sample", "--num-samples", "2", "--num-steps", "2", "--device", "cpu")


def write_table(folder, labels):
    (folder / "dataset.json").write_text(json.dumps(dict(labels=labels)))


def test_dataset_json(tmp_path):
    """EDM's and StyleGAN's layout: shard folders are no classes, the table's labels count; `null`: no
    labels."""
    for seed, shard in enumerate(("00000", "00001")):
        noise_images(tmp_path / shard, 4, seed=seed)
    files = [f"{shard}/{i:03d}.png" for shard in ("00000", "00001") for i in range(4)]
    labels = [2, 0, 10, 2, 0, 0, 10, 2]
    write_table(tmp_path, [list(pair) for pair in zip(files, labels, strict=True)])
    data = ImageFolder(tmp_path, 32)
    assert data.classes == ["0", "2", "10"]                          # numbers are sorted as numbers
    of = {os.path.relpath(os.fsdecode(f), tmp_path): data.classes[k]
          for f, k in zip(data.files, data.labels, strict=True)}
    assert of == {file: str(label) for file, label in zip(files, labels, strict=True)}
    write_table(tmp_path, None)
    assert {name: len(paths) for name, paths in list_classes(tmp_path).items()} == {"0": 8}
    for text, word in (('{"labels": [["00000/000.png", 1]]}', "00000/001.png"), ("[1, 2]", "labels"),
                       ('{"labels": [["00000/000.png", "cat"]]}', "cat"), ("[" * 100000, "recursion"),
                       ('{"labels": [["00000/000.png", 1.5]]}', "1.5")):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(UserError, match=f"dataset.json: .*{word}"):
            list_classes(tmp_path)


def test_held_out_labels_are_those_of_the_training_data(image_dir, tmp_path):
    (tmp_path / "two words").symlink_to(image_dir / "two words")
    cfg = tiny_config("--val-dir", str(tmp_path), "--eval-steps", "1")
    assert images.held_out_images(cfg, ImageFolder(image_dir, 32))[1].tolist() == [1] * 12


def test_names_that_differ_in_unicode_form_are_one_class(tmp_path):
    nfc = "\u00e9cole"
    nfd = unicodedata.normalize("NFD", nfc)
    for name in (nfc, nfd, "fish"):
        noise_images(tmp_path / name, 2, size=8)
    assert {name: len(files) for name, files in list_classes(tmp_path).items()} == {"fish": 2, nfc: 4}
    write_table(tmp_path, [[f"{name}/{i:03d}.png", k]
                           for i in range(2) for name, k in ((nfc, 3), (nfd, 4), ("fish", 5))])
    found = list_classes(tmp_path)                    # a file's own name first, then another form of it
    assert {k: files[0].parent.name for k, files in found.items()} == {"3": nfc, "4": nfd, "5": "fish"}
    shutil.rmtree(tmp_path / nfc)
    assert list(list_classes(tmp_path)) == ["4", "5"]


# --- Cached latents -----------------------------------------------------------------------------------------

def test_cached_latents(image_dir, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    shutil.copytree(image_dir, folder)
    noise_images(folder / "two words", 190)
    (folder / "one/000.png").write_bytes(b"not an image")
    monkeypatch.setattr(images, "CHUNK", 10)

    def cached(seed=0, resolution=32):
        data = ImageFolder(folder, resolution)
        torch.manual_seed(seed)
        net = AutoencoderKL("f4d8")
        cfg = SimpleNamespace(output_dir=tmp_path / "exps", num_workers=0, resolution=resolution)
        latents.use_cached_latents(data, net, CPU, cfg, Processes())
        return Path(data.cached), net

    def read(files):
        return torch.cat([torch.load(file, weights_only=True) for file in files])

    (where, net), data = cached(), ImageFolder(folder, 32)
    files = sorted(where.iterdir())
    rows = read(files)
    assert where.parent == tmp_path / "exps" and len(files) == 21 and rows.dtype == torch.float16
    with torch.no_grad():
        moments = net.encode(data[23][0][None] / 127.5 - 1).moments[0]
    assert rows[0].isnan().all() and torch.allclose(rows[23].float(), moments, rtol=1e-3, atol=1e-4)

    before, written = files[1].read_bytes(), files[0].stat().st_mtime_ns
    files[1].write_bytes(before[:500] + bytes(200) + before[700:])     # such as a crash of the machine leaves
    files[2].write_bytes(before[:len(before) // 2])
    files[3].unlink()
    assert cached()[0] == where and files[0].stat().st_mtime_ns == written      # what is right stays
    assert torch.equal(read(files)[1:], rows[1:])
    assert "2 damaged files, written again\n" in capsys.readouterr().out

    data.cached, data.with_images = where, False
    image, _, error, moments = data[0]          # 202 // 20 further, as without cache
    assert image.numel() == 0 and torch.equal(moments, rows[10])
    assert "000.png: unreadable when the latents were cached" in error and f"delete {where}/000000.pt" in error
    for damage in (b"", bytes(len(before))):                                 # while a run reads
        files[1].write_bytes(damage)
        with pytest.raises(UserError, match="000001.pt: these latents cannot be read .*; delete the file"):
            data[15]
    data.with_images = True
    assert torch.equal(data[5][0], ImageFolder(folder, 32)[5][0])

    victim = folder / "one/001.png"                  # another image of the same name, size and time of change
    old = victim.stat()
    victim.write_bytes(b"\x89PNG" + bytes(old.st_size - 4))
    os.utime(victim, ns=(old.st_atime_ns, old.st_mtime_ns))
    changed = cached()[0]
    assert len({where, changed, cached(1)[0], cached(resolution=16)[0]}) == 4
    (folder / "one/002.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="3 of 202 images unreadable"):
        cached()
