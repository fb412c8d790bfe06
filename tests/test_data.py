"""Pictures and labels: which files are read, as which class, in which order; what becomes of damaged ones."""
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support import checkpoints, pictures
import sample
import train
import vae
from conftest import (CPU, ROOT, SHORT, losses, metrics_of, noise_pictures, one_line, run, slow,
                      tiny_config)

ONE_STEP = [*SHORT, "--max-train-steps", "1"]


def saved_args(folder, run="tiny"):
    return files.load_tensors(checkpoints.checkpoints(folder / "exps" / run)[-1])["args"]


# --- Order and pixels ---------------------------------------------------------------------------------------

def test_order_does_not_depend_on_the_number_of_processes():
    cfg = tiny_config("--flip", "--max-train-steps", "9")

    def order(step, rank, world):
        return list(images.step_batches(10, cfg, step, rank, world))

    assert order(0, 0, 1) == [a + b for a, b in zip(order(0, 0, 2), order(0, 1, 2))]
    assert order(0, 0, 1)[5:] == order(5, 0, 1)                          # a resumed run sees the same batches
    seen = [i for batch in order(0, 0, 1) for i, _ in batch]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))   # each epoch holds each image once
    assert seen[:10] != seen[10:20] and seen[:10] != sorted(seen[:10])
    assert {flip for batch in order(0, 0, 1) for _, flip in batch} == {True, False}
    cfg.flip = False
    assert not any(flip for batch in order(0, 0, 1) for _, flip in batch)


def test_center_crop_by_hand():
    """16x8 to 2: box-halved to 8x4 and to 4x2 (both sides still >= 2 * 2), then the middle 2 columns; 8x16 alike."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 3), np.uint8)
    half = np.floor(pixels.reshape(4, 2, 8, 2, 3).mean((1, 3)) + 0.5)
    quarter = np.floor(half.reshape(2, 2, 4, 2, 3).mean((1, 3)) + 0.5)
    for turned in (False, True):
        image = Image.fromarray(pixels.transpose(1, 0, 2) if turned else pixels)
        got = np.array(images.center_crop(image, 2)).astype(int)
        assert np.abs((got.transpose(1, 0, 2) if turned else got) - quarter[:, 1:3]).max() <= 2


def test_pixels_round_trip_and_round():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pictures.to_uint8(pictures.to_float(levels)), levels)
    assert torch.equal(pictures.to_float(torch.tensor([0, 255], dtype=torch.uint8)), torch.tensor([-1.0, 1.0]))
    assert pictures.to_uint8(torch.tensor([-3.0, 3.0, (200.6 / 127.5) - 1])).tolist() == [0, 255, 201]


def test_items_are_images_with_labels_and_flips(pictures):
    data = images.ImageFolder(pictures, 32)
    image, label, bad = data[13, False]
    assert torch.equal(image, images.read_image(pictures / "two words/001.png", 32)) and (label, bad) == (1, "")
    assert torch.equal(data[13, True][0], image.flip(2)) and data.classes == ["one", "two words"]
    assert [data[i, False][1] for i in (0, 11, 12, 23)] == [0, 0, 1, 1]


# --- Damaged files and odd names ----------------------------------------------------------------------------

def test_unreadable_images_are_replaced(tmp_path):
    folder = noise_pictures(tmp_path / "it's a \"class\" \u00fc", 3)
    Image.new("RGB", (3, 500)).save(folder / "thin.png")
    (folder / "empty.png").touch()
    Image.new("1", (14000, 14000)).save(folder / "bomb.png")        # 196 million pixels: Pillow refuses it
    data = images.ImageFolder(tmp_path, 32)
    items = {Path(os.fsdecode(path)).name: data[i, False] for i, path in enumerate(data.files)}
    assert {name for name, (_, _, bad) in items.items() if bad} == {"empty.png", "bomb.png"}
    assert torch.equal(items["bomb.png"][0], items["thin.png"][0]) and items["bomb.png"][2].endswith("/bomb.png")


def test_too_many_unreadable_images_end_the_run(pictures, tmp_path, command):
    shutil.copytree(pictures, tmp_path / "few")
    (tmp_path / "few/one/000.png").write_bytes(b"rubbish")
    out = command("train", "--data-dir", tmp_path / "few", *SHORT, "--vae-only", "--max-train-steps", "20", code=2)
    one_line(out, "of 24 images unreadable", "000.png")


def test_names_that_are_no_utf8(tmp_path, frozen_vae):
    """A damaged file of such a name while its latents are cached, and in the run, under an output that is strict."""
    name = b"caf\xe9.png"
    folder = noise_pictures(tmp_path / "data", 120, size=32)
    (folder / os.fsdecode(name)).write_bytes(b"rubbish")
    out = run(sys.executable, ROOT / "train.py", "--data-dir", folder, *SHORT, "--max-train-steps", "31",
              "--vae-grad", "none", "--cache-latents", "--vae-ckpt", frozen_vae, "--log-steps", "10", cwd=tmp_path,
              env={"PYTHONIOENCODING": "utf-8:strict", "PYTHONUTF8": "1"})
    assert "skipped an unreadable image" in out and "caf\\udce9.png" in out and "step 31" in out


def test_links_to_nothing_are_left_out(pictures, tmp_path, command, frozen_vae):
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data/one/gone.png").symlink_to(tmp_path / "nowhere.png")
    out = command("train", "--data-dir", tmp_path / "data", *ONE_STEP, "--vae-grad", "none", "--vae-ckpt", frozen_vae,
                  "--cache-latents")
    assert "24 images in 2 classes" in out and "gone" not in out


# --- Labels -------------------------------------------------------------------------------------------------

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
    model = sample.load_checkpoint(checkpoints.checkpoints(tmp_path / "exps/tiny")[-1])
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
    assert "12 images in 1 classes" in out and metrics_of(tmp_path / "exps/tiny")[0]["val_psnr"] > 0
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
    found = images.ImageFolder(data, 32)
    assert found.classes == ["0", "2", "10"]                          # numbers are sorted as numbers
    of = {os.path.relpath(os.fsdecode(f), data): found.classes[k] for f, k in zip(found.files, found.labels)}
    assert of == {file: str(label) for file, label in zip(files, labels)}
    assert "8 images in 3 classes" in command("train", "--data-dir", data, *ONE_STEP, "--vae-only")
    assert saved_args(tmp_path)["classes"] == ["0", "2", "10"]
    write_table(data, None)
    assert "8 images in 1 classes" in command("train", "--data-dir", data, *ONE_STEP, "--vae-only", "--overwrite")
    for text, word in (('{"labels": [["00000/000.png", 1]]}', "00000/001.png"), ('{"pictures": 3}', "labels"),
                       ('{"labels": [["00000/000.png", "cat"]]}', "cat"), ('{"labels": [1, 2]}', "labels"),
                       ("{", "labels"), ("[1, 2]", "labels")):
        (data / "dataset.json").write_text(text)
        out = command("train", "--data-dir", data, *ONE_STEP, "--vae-only", "--overwrite", code=2)
        one_line(out, "dataset.json: ", word)


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


def test_files_that_come_with_old_times_are_seen(tmp_path):
    data = noise_pictures(tmp_path / "data/a", 3).parent
    assert len(images.ImageFolder(data, 32)) == 3
    times = os.stat(data / "a")
    noise_pictures(data / "a", 8, seed=1)
    os.utime(data / "a", ns=(times.st_atime_ns, times.st_mtime_ns))   # as cp -a and rsync -a leave it
    assert len(images.ImageFolder(data, 32)) == 8


# --- Cached latents -----------------------------------------------------------------------------------------

def test_cached_latents(pictures, tmp_path, frozen_vae, monkeypatch):
    folder = tmp_path / "data"
    shutil.copytree(pictures, folder)
    (folder / "one/000.png").write_bytes(b"not a picture")
    cfg = tiny_config("--vae-grad", "none", "--vae-ckpt", str(frozen_vae), "--cache-latents", "--data-dir",
                      str(folder), "--output-dir", str(tmp_path))
    m = train.build(cfg, CPU)
    train.wrap(m, cfg, 1)
    monkeypatch.setattr(train, "CHUNK", 10)                             # images in a file

    def cached():
        return Path(train.cache_latents(m, cfg, images.ImageFolder(folder, 32), CPU, 0, 1, None))

    where, data = cached(), images.ImageFolder(folder, 32)
    files = sorted(where.iterdir())
    parts = [torch.load(file, weights_only=True) for file in files]
    rows = torch.cat(parts)
    assert [len(part) for part in parts] == [10, 10, 4] and rows.dtype == torch.float16
    assert rows[0].isnan().all() and rows[1:].isfinite().all()
    for i in (1, 23):
        posterior = m.vae.encode(pictures.to_float(data[i, False][0][None]))
        assert torch.allclose(rows[i, :8].float(), posterior.mean[0], rtol=1e-3, atol=1e-3)
        assert torch.allclose(rows[i, 8:].float(), posterior.logvar[0], rtol=1e-3, atol=1e-2)

    before, times = files[1].read_bytes(), files[0].stat().st_mtime_ns
    files[1].unlink()                                                   # killed: what is there stays
    assert cached() == where and files[1].read_bytes() == before and files[0].stat().st_mtime_ns == times

    data.cached, data.with_images = where, False
    image, _, bad, moments = data[0, False]  # the next readable one, as without cache
    assert image.numel() == 0 and bad.endswith("000.png") and torch.equal(moments, rows[1])
    data.with_images = True
    assert torch.equal(data[5, False][0], images.ImageFolder(folder, 32)[5, False][0])

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
    assert len({where, replaced, cached()}) == 3                        # another VAE, another folder


# --- Starting from another run, other sizes -----------------------------------------------------------------

def test_init_from_another_number_of_classes_and_resolution(short_run, capsys):
    """New label rows and positions, said in a line; all other weights as they were."""
    ckpt = short_run / "exps/a/checkpoints/0000004.pt"
    saved = files.load_tensors(ckpt)
    m = train.build(tiny_config("--init-from", str(ckpt), "--num-classes", "7", "--resolution", "64"), CPU)
    said = [line for line in capsys.readouterr().out.splitlines() if "start anew" in line]
    assert len(said) == 1 and "pos_embed, y_embedder" in said[0] and "projectors" not in said[0]
    for net, key in ((m.sit, "model"), (m.ema, "ema")):
        assert net.y_embedder.embedding_table.weight.shape == (8, 256) and net.pos_embed.shape == (1, 64, 256)
        anew = {name for name, t in net.state_dict().items() if not torch.equal(t, saved[key][name])}
        assert anew == {"pos_embed", "y_embedder.embedding_table.weight"}
    assert torch.equal(m.sit.pos_embed, train.SiT("SiT-T/2", 16, 8, 7, encoder_depth=2).pos_embed)
    train.build(tiny_config("--init-from", str(ckpt), "--num-classes", "2"), CPU)
    assert "start anew" not in capsys.readouterr().out


@slow
@pytest.mark.parametrize("preset, patch", [("sdvae-xl2", 2), ("invae-xl1", 1)])
def test_512_pixels(preset, patch, tmp_path, monkeypatch):
    """A preset's VAE, a quarter as wide, and a small SiT: built, stepped, saved and sampled at 512."""
    name = train.PRESETS[preset]["vae"]
    monkeypatch.setitem(vae.VAES, name, vae.VAES[name] | dict(ch=32))
    cfg = train.parse_config([
        "--preset", preset, "--resolution", "512", "--model", f"SiT-T/{patch}", "--encoder-depth", "2", "--enc-type",
        "efficientnet-lite0", "--perceptual", "encoder", "--vae-from-scratch", "--data-dir", str(tmp_path),
        "--batch-size", "1", "--no-compile", "--disc-start", "0", "--projector-dim", "32", "--num-classes", "3"])
    m = train.build(cfg, CPU)
    train.wrap(m, cfg, 1)
    assert m.size == (64 if name == "f8d4" else 32) and m.sit.pos_embed.shape[1] == 1024
    batch = torch.randint(256, (1, 3, 512, 512), dtype=torch.uint8), torch.zeros(1, dtype=torch.long), [""]
    metrics = train.run_step(m, cfg, 0, batch, 0, 1)
    assert all(value.isfinite() for value in metrics.values()) and metrics["skipped"] == 0
    train.save_checkpoint(m, cfg, tmp_path, 1, ["a", "b", "c"])
    images = sample.sample_images(sample.load_checkpoint(tmp_path / "checkpoints/0000001.pt"), [0], num_steps=1)
    assert images.shape == (1, 3, 512, 512)


# --- Surroundings -------------------------------------------------------------------------------------------

def test_surroundings(pictures, tmp_path, command, monkeypatch):
    flags = ["--data-dir", pictures, *ONE_STEP, "--vae-only"]
    one_line(command("train", *flags, "--output-dir", "/proc/x", code=2), "/proc/x")
    (tmp_path / "a file").touch()
    one_line(command("train", *flags, "--output-dir", "a file", code=2), "a file")
    with monkeypatch.context() as patch:
        patch.setattr(train, "build", lambda *args: pytest.fail("it was built first"))
        for package in ("wandb", "tensorboard"):
            patch.setitem(sys.modules, package, None)                 # as if it were not installed
            one_line(command("train", *flags, "--report-to", package, code=2), f"pip install {package}")
    monkeypatch.setenv("WORLD_SIZE", "1")                             # by a platform, with nothing beside it
    command("train", *flags)
    assert len(losses(tmp_path / "exps/tiny")) == 1
