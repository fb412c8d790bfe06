"""Pictures, their order and what becomes of damaged ones."""
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
import vae
from conftest import ROOT, SHORT, losses, one_line, run, slow, tiny_config, torchrun
from vae import UserError


def test_noise_and_order_do_not_depend_on_the_number_of_processes():
    cfg = tiny_config("--flip")
    whole = train.draw_noise(cfg, 7, (8, 8, 8), 0, 1, "cpu")
    halves = [train.draw_noise(cfg, 7, (8, 8, 8), r, 2, "cpu") for r in range(2)]
    assert all(torch.equal(w, torch.cat(h)) for w, *h in zip(whole, *halves))
    assert not torch.equal(train.draw_noise(cfg, 8, (8, 8, 8), 0, 1, "cpu")[0], whole[0])
    cfg.max_train_steps = 9
    order = lambda step, rank, world: list(train.step_batches(10, cfg, step, rank, world))
    assert order(0, 0, 1) == [a + b for a, b in zip(order(0, 0, 2), order(0, 1, 2))]
    assert order(0, 0, 1)[5:] == order(5, 0, 1)                          # a resumed run sees the same batches
    seen = [i for batch in order(0, 0, 1) for i, _ in batch]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))   # each epoch holds each image once
    assert {flip for batch in order(0, 0, 1) for _, flip in batch} == {True, False}


def test_center_crop_by_hand():
    """A 12x8 image to 2: box-halved once to 6x4, once more to 3x2 (both sides still >= 2 * 2), then the middle 2 columns."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)
    got = np.array(vae.center_crop(Image.fromarray(pixels), 2)).astype(int)
    half = np.floor(pixels.reshape(4, 2, 6, 2, 3).mean((1, 3)) + 0.5)
    quarter = np.floor(half.reshape(2, 2, 3, 2, 3).mean((1, 3)) + 0.5)
    assert np.abs(got - quarter[:, 0:2]).max() <= 1


def test_pixels_round_trip_and_round():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(vae.to_uint8(vae.to_float(levels)), levels)
    assert vae.to_uint8(torch.tensor([-3.0, 3.0, (200.6 / 127.5) - 1])).tolist() == [0, 255, 201]


def test_transparent_and_grey_images(tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (32, 32), 77).save(tmp_path / "grey.png")
    assert vae.read_image(tmp_path / "clear.png", 32).min() == 255
    assert (vae.read_image(tmp_path / "grey.png", 16) == 77).all()


def test_odd_images(tmp_path):
    folder = tmp_path / "it's a \"class\" \u00fc"
    folder.mkdir()
    Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)).save(folder / "sixteen.png")
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(folder / "cmyk.jpg")
    frames = [Image.new("P", (40, 40), i) for i in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (3, 500)).save(folder / "thin.png")
    (folder / "empty.png").touch()
    Image.new("1", (14000, 14000)).save(folder / "bomb.png")        # 196 million pixels: Pillow refuses it
    data = train.ImageFolder(tmp_path, 32, tmp_path)
    items = {Path(os.fsdecode(path)).name: data[i, False] for i, path in enumerate(data.files)}
    assert {name for name, (_, _, bad) in items.items() if bad} == {"empty.png", "bomb.png"}
    sixteen = vae.read_image(folder / "sixteen.png").int()
    assert sixteen.max() > 250 and len(sixteen.unique()) > 200      # scaled, not clipped
    red = vae.read_image(folder / "cmyk.jpg", 32).float().mean((1, 2))
    assert red[0] > 200 and red[1] < 60 and red[2] < 60


def test_corrupt_images_are_skipped_or_refused(pictures, tmp_path):
    many = tmp_path / "many"
    shutil.copytree(pictures, many)
    for i in range(120):
        shutil.copy(many / "one/0.png", many / f"one/copy{i}.png")
    (many / "one/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    data = train.ImageFolder(many, 32, tmp_path)
    index = next(i for i, path in enumerate(data.files) if path.endswith(b"broken.png"))
    image, label, bad = data[index, False]
    assert image.shape == (3, 32, 32) and bad.endswith("broken.png")
    few = tmp_path / "few"
    shutil.copytree(pictures, few)
    (few / "one/0.png").write_bytes(b"rubbish")
    out = run(sys.executable, ROOT / "train.py", "--data-dir", few, *SHORT, "--max-train-steps", "20", cwd=tmp_path, code=2)
    one_line(out, "more than 1 in 100", "0.png")


def test_the_index_of_files_notices_change(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for name in ("b/deep/1.png", "a/2.png", "a/1.png"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(data / name)

    def listed():
        folder = train.ImageFolder(data, 8, tmp_path)
        return [os.fsdecode(f).removeprefix(f"{data}/") for f in folder.files], folder.labels.tolist()

    assert listed() == (["a/1.png", "a/2.png", "b/deep/1.png"], [0, 0, 1])
    with monkeypatch.context() as patch:                             # unchanged: nothing is listed again
        patch.setattr(train, "list_images", None)
        assert listed() == (["a/1.png", "a/2.png", "b/deep/1.png"], [0, 0, 1])
    shutil.copy(data / "a/1.png", data / "b/deep/2.png")
    assert listed() == (["a/1.png", "a/2.png", "b/deep/1.png", "b/deep/2.png"], [0, 0, 1, 1])
    (data / "a/1.png").unlink()
    (data / "c").mkdir()
    shutil.copy(data / "a/2.png", data / "c/1.png")
    assert listed() == (["a/2.png", "b/deep/1.png", "b/deep/2.png", "c/1.png"], [0, 1, 1, 2])
    next(tmp_path.glob(".index-*.json")).write_text('{"folder": "damaged')
    assert len(listed()[0]) == 4


def test_cached_latents(pictures, tmp_path, regime):
    folder = tmp_path / "data"
    shutil.copytree(pictures, folder)
    (folder / "one/0.png").write_bytes(b"not a picture")
    m, cfg, args = regime(*FROZEN, "--cache-latents", "--data-dir", str(folder), "--num-workers", "0",
                          "--output-dir", str(tmp_path))
    data = train.ImageFolder(folder, 32, tmp_path)
    file = train.cache_latents(m, cfg, data, torch.device("cpu"), 0, 1, chunk=10)
    rows = torch.from_numpy(np.load(file))
    assert rows.dtype == torch.float16 and rows[0].isnan().all() and rows[1:].isfinite().all()
    for i in (1, 23):
        posterior = m.vae.encode(vae.to_float(data[i, False][0][None]))
        assert torch.allclose(rows[i, :8].float(), posterior.mean[0], rtol=1e-3, atol=1e-3)
        assert torch.allclose(rows[i, 8:].float(), posterior.logvar[0], rtol=1e-3, atol=1e-2)

    done = np.lib.format.open_memmap(file.with_name("done.npy"), "r+")  # killed before the second turn was written
    assert done.tolist() == [1, 1, 1]
    done[1] = 0
    broken = np.lib.format.open_memmap(file, "r+")
    broken[:20] = 7
    assert train.cache_latents(m, cfg, data, torch.device("cpu"), 0, 1, chunk=10) == file
    again = torch.from_numpy(np.load(file))
    assert (again[:10] == 7).all() and torch.equal(again[10:], rows[10:]) and done.tolist() == [1, 1, 1]
    broken[:10] = rows[:10].numpy()

    data.cached, data.with_images = file, False
    image, label, bad, moments = data[0, False]                         # the next readable one, as without cache
    assert image.numel() == 0 and bad.endswith("0.png") and torch.equal(moments, rows[1])
    data.with_images = True
    assert torch.equal(data[5, False][0], train.ImageFolder(folder, 32, tmp_path)[5, False][0])

    encode, m.vae.encode = m.vae.encode, None                           # a step runs no VAE
    assert train.train_step(m, cfg, 0, *args, rows[1:5])["loss"].isfinite()
    m.vae.encode = encode

    m.vae.quant_conv.bias.data += 1                                     # another VAE, other data: other files
    data = train.ImageFolder(folder, 32, tmp_path)
    other = train.cache_latents(m, cfg, data, torch.device("cpu"), 0, 1)
    (folder / "one/0.png").write_bytes(b"another picture")
    assert len({file, other, train.cache_latents(m, cfg, data, torch.device("cpu"), 0, 1)}) == 3
