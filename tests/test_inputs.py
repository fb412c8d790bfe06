"""What people hand in and what they keep: names of runs, overwriting, signals, odd pictures, what is not read."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import images
from support import checkpoints, files
from experiments import analyze
import fid
from conftest import ROOT, SHORT, needs, noise_pictures, one_line, run
from support.commands import UserError

ONE_STEP = [*SHORT, "--max-train-steps", "1", "--vae-only"]
ANIMATED = dict(save_all=True, append_images=[Image.new("RGB", (40, 40), "blue")])


# --- Names, overwriting -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a/b", "a\\b", "../outside", ".", "..", ".hidden", "/tmp/x", "a/", "C:a", ""])
def test_a_run_has_one_plain_name(name, pictures, tmp_path, command):
    one_line(command("train", "--data-dir", pictures, *SHORT, "--exp-name", name, code=2), "--exp-name: must be one")
    assert not list(tmp_path.iterdir())


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_overwriting_deletes_what_the_project_writes_and_nothing_else(pictures, tmp_path, command):
    """A run with all that train.py, sample.py, analyze.py and compare.sh leave in it; among it what they do not
    write, other runs included."""
    exp, outside = tmp_path / "exps/tiny", tmp_path / "outside"
    flags = ["--data-dir", pictures, *SHORT, "--disc-weight", "0", "--checkpointing-steps", "2"]
    command("train", *flags, "--sampling-steps", "2")
    command("sample", "--num-samples", "2", "--num-steps", "1", "--device", "cpu")
    ckpt = exp / "checkpoints/0000002.pt"
    ckpt.rename(ckpt.with_suffix(".damaged"))
    made = {"evaluation-0000004.json", "evaluation-0000004.png", "judged.json",
            "events.out.tfevents.1764167181.node-1.77.0", ".evaluation-0000004.json.77.tmp",
            "checkpoints/.0000006.pt.4.tmp"}
    kept = {"notes.txt", "checkpoints/best.pt", "checkpoints/0000002.pt.bak", "pictures/mine.png", "samples.npz",
            "samples-final.png", "inner/args.json", "inner/checkpoints/0000004.pt", "wandb/offline-run-1/run.wandb",
            "evaluation.json", ".git/config"}
    for name in made | kept:
        (exp / name).parent.mkdir(parents=True, exist_ok=True)
        (exp / name).write_text("theirs")
    noise_pictures(outside, 2)
    (exp / "linked").symlink_to(outside)
    before = files_in(exp)
    assert {"metrics.jsonl", "samples-0000004.png", "pictures/reconstructions-0000002.png", "args.json",
            "checkpoints/0000002.damaged", "checkpoints/0000004.pt"} <= before
    out = command("train", *flags, "--max-train-steps", "1", "--overwrite")
    written = {".lock", "args.json", "metrics.jsonl", "checkpoints/0000001.pt", "pictures/samples-0000001.png",
               "pictures/reconstructions-0000001.png"}
    assert files_in(exp) == written | kept and (exp / "linked").is_symlink() and len(list(outside.iterdir())) == 2
    assert all((exp / name).read_text() == "theirs" for name in kept)
    said = [line for line in out.splitlines() if "left as they were" in line]
    assert len(said) == 1 and "checkpoints/0000002.pt.bak, checkpoints/best.pt, pictures/mine.png, .git" in said[0]
    assert said[0].endswith(", ...")


def test_overwriting_an_ordinary_run_leaves_nothing_to_say(pictures, tmp_path, command):
    """Not even where its args.json is gone: its checkpoints would be taken for the new run's."""
    flags = ["--data-dir", pictures, *SHORT, "--vae-only"]
    command("train", *flags)
    (tmp_path / "exps/tiny/args.json").unlink()
    out = command("train", *flags, "--max-train-steps", "1", "--overwrite")
    assert "left as" not in out and [p.stem for p in checkpoints.checkpoints(tmp_path / "exps/tiny")] == ["0000001"]


def test_a_linked_folder_of_checkpoints_loses_its_link_alone(tmp_path):
    other = tmp_path / "other/checkpoints"
    other.mkdir(parents=True)
    (other / "0000002.pt").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(other)
    checkpoints.clear_run(tmp_path / "run", pytest.fail)
    assert not list((tmp_path / "run").iterdir()) and (other / "0000002.pt").exists()


def test_a_start_sweeps_up_only_what_the_run_left_half_written(pictures, tmp_path, command):
    exp = tmp_path / "exps/tiny"
    ours = {"checkpoints/.0000002.pt.12.tmp", "pictures/.samples-0000002.png.12.tmp", ".metrics.jsonl.12.tmp"}
    theirs = {".notes.tmp", ".report.doc.12.tmp", "inner/.args.json.12.tmp", "checkpoints/.cache.tmp",
              ".samples.npz.12.tmp"}                                 # sample.py may be writing this one
    for name in ours | theirs:
        (exp / name).parent.mkdir(parents=True, exist_ok=True)
        (exp / name).touch()
    command("train", "--data-dir", pictures, *ONE_STEP)
    assert theirs <= files_in(exp) and not ours & files_in(exp)


def test_fid_does_not_write_over_what_it_reads(pictures, tmp_path, command):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    before = (tmp_path / "samples.npz").read_bytes()
    for flag in ("--save-stats", "--json"):
        out = command("fid", pictures / "one", "samples.npz", flag, "./samples.npz", code=2)
        one_line(out, "it is not written over")
    assert (tmp_path / "samples.npz").read_bytes() == before


@pytest.mark.parametrize("flags", ["reconstruct vae.png SOURCE",
                                   pytest.param("latents SOURCE vae.png", marks=needs("matplotlib"))])
def test_analyze_does_not_write_over_what_it_reads(flags, tmp_path, monkeypatch):
    photos = noise_pictures(tmp_path / "photos", 1)
    picture = (photos / "000.png").read_bytes()
    monkeypatch.chdir(tmp_path)
    Path("vae.png").touch()
    for source, out in ((photos, photos / "000.png"), (photos / "000.png", photos / "000.png"), (photos, "vae.png")):
        words = [str(source) if word == "SOURCE" else word for word in flags.split()]
        monkeypatch.setattr(sys, "argv", ["analyze.py", *words, "--out", str(out), "--device", "cpu"])
        with pytest.raises(UserError, match=f"{out}: this file is read, it is not written over"):
            analyze.main()
    assert (photos / "000.png").read_bytes() == picture


# --- Signals ------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="a signal of POSIX systems")
def test_sigusr1_saves_and_ends_the_run(pictures, tmp_path):
    """Sent to the group, loader processes included, as clusters do before a job's time is up."""
    flags = ["--data-dir", pictures, *SHORT, "--vae-only", "--max-train-steps", "2000", "--num-workers", "1"]
    log, metrics, deadline = tmp_path / "log", tmp_path / "exps/tiny/metrics.jsonl", time.time() + 120
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, flags)], cwd=tmp_path,
                               stdout=open(log, "w"), stderr=subprocess.STDOUT, start_new_session=True)
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.time() < deadline, log.read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGUSR1)
    assert process.wait(60) == 0, log.read_text()
    saved, = checkpoints.checkpoints(tmp_path / "exps/tiny")
    assert "--resume" in log.read_text() and files.load_tensors(saved)["steps"] == int(saved.stem)


# --- Pictures that are too much -----------------------------------------------------------------------------

def test_a_thin_picture_is_unreadable_in_one_line(tmp_path):
    """Enlarged to 256 it would have 4 thousand million pixels; one of the same width and 300 rows is read."""
    folder = noise_pictures(tmp_path / "data", 2)
    for name, size in (("thin", (65000, 1)), ("wide", (65000, 300)), ("tall", (1, 20000))):
        Image.new("RGB", size).save(folder / f"{name}.png")
    assert images.read_image(folder / "thin.png").shape == (3, 1, 65000)
    assert images.read_image(folder / "wide.png", 256).shape == (3, 256, 256)
    with pytest.raises(UserError, match=r"thin.png: cannot be read \(so thin that it is enlarged to 16640000 x"):
        images.read_image(folder / "thin.png", 256)
    data = images.ImageFolder(folder, 256)
    told = {Path(os.fsdecode(path)).stem: data[i, False][2] for i, path in enumerate(data.files)}
    assert told["wide"] == told["000"] == "" and "so thin" in told["thin"] and "256 x 5120000" in told["tall"]


def test_the_limit_is_pillows_own():
    """At 256 pixels wide, 89,478,485 pixels are 349,525 rows and a bit: 1365 rows of one pixel, enlarged, not 1366."""
    assert images.center_crop(Image.new("L", (1, 1365)), 256).size == (256, 256)
    with pytest.raises(ValueError, match="so thin"):
        images.center_crop(Image.new("L", (1, 1366)), 256)


def test_bombs_are_one_line_each(tmp_path, pictures):
    """Above Pillow's warning and above its error: unreadable, in train.py and fid.py, and no warning of the library,
    from no process."""
    folder = tmp_path / "data"
    shutil.copytree(pictures, folder)
    for rows, name in ((9000, "one/big.png"), (18000, "two words/bigger.png")):          # 90 and 180 million pixels
        Image.new("1", (10000, rows)).save(folder / name)
    for i in range(200):
        shutil.copy(pictures / "one/000.png", folder / f"one/more{i}.png")
    out = run(sys.executable, ROOT / "train.py", "--data-dir", folder, *SHORT, "--vae-only", "--num-workers", "2",
              "--batch-size", "56", cwd=tmp_path)
    assert out.count("skipped an unreadable image") == 2 and "Warning" not in out
    assert "big.png: cannot be read (10000 x 9000 pixels, above 89478485)" in out
    out = run(sys.executable, ROOT / "fid.py", folder / "one", folder / "one", "--resolution", "32", "--num-workers",
              "2", "--device", "cpu", cwd=tmp_path, code=2)
    one_line(out, "one/big.png: cannot be read (10000 x 9000 pixels")
    assert "Warning" not in out


@needs("matplotlib")
def test_a_bomb_is_unreadable_for_analyze(tmp_path, monkeypatch):
    Image.new("1", (10000, 9000)).save(tmp_path / "big.png")
    monkeypatch.setattr(sys, "argv", ["analyze.py", "latents", str(tmp_path), "vae.pt", "--resolution", "32"])
    with pytest.raises(UserError, match="big.png: cannot be read .10000 x 9000 pixels"):
        analyze.main()


# --- What is not read ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["set.zip", "set.tar", "train.parquet", "Set.ZIP"])
def test_a_packed_data_set_names_the_command_that_unpacks_it(name, tmp_path, command):
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in (tmp_path / name, folder / name):
        file.write_bytes(b"PK")
    for flag in ("--data-dir", "--val-dir"):
        one_line(command("train", *SHORT, flag, name, code=2), "a folder that exists", f"data/unpack.py {name} DIR")
    one_line(command("train", *SHORT, "--data-dir", "folder", code=2), "no images in it", "data/unpack.py folder DIR")
    one_line(command("fid", name, "folder", code=2), "give a folder or an .npz", f"data/unpack.py {name} DIR")
    one_line(command("fid", "folder", name, code=2), "no images in it", "data/unpack.py folder DIR")
    assert "unpack" not in command("train", *SHORT, "--data-dir", "nowhere", code=2)


def test_captions_and_arrays_are_told(pictures, tmp_path, command, capsys):
    folder = tmp_path / "data"
    shutil.copytree(pictures, folder)
    images.list_classes(folder)
    assert capsys.readouterr().out == ""
    for file in list(folder.rglob("*.png")):
        file.with_suffix(".txt").write_text("a picture of noise")
    (folder / "metadata.jsonl").write_text('{"file_name": "one/000.png", "text": "noise"}\n')
    np.save(folder / "latents.npy", np.zeros(3))
    assert len(images.list_classes(folder)["one"]) == 12
    said, = capsys.readouterr().out.splitlines()
    assert "captions, tables and arrays are not read (24 of .txt, 1 of .jsonl, 1 of .npy); classes are folders" in said
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    np.save(arrays / "a.npy", np.zeros(3))
    one_line(command("train", *SHORT, "--data-dir", arrays, code=2), "1 of .npy; arrays are not read, images are (PNG")


@pytest.mark.parametrize("suffix", ["gif", "webp", "tiff", "png"])
def test_of_several_frames_the_first_is_read(suffix, tmp_path, capsys):
    """Told in one line; of PNG, whose frames hardly anyone uses, it is only done."""
    folder = noise_pictures(tmp_path / "data", 4)
    images.list_classes(folder)
    assert capsys.readouterr().out == ""
    lossless = dict(lossless=True) if suffix == "webp" else {}
    Image.new("RGB", (40, 40), "red").save(folder / f"a.{suffix}", **ANIMATED, **lossless)
    assert Image.open(folder / f"a.{suffix}").n_frames == 2
    assert images.read_image(folder / f"a.{suffix}")[:, 0, 0].tolist() == [255, 0, 0]
    line = f"{folder}: images of several frames in it; the first frame of each is read"
    images.list_classes(folder)
    assert capsys.readouterr().out.splitlines() == ([line] if suffix != "png" else [])
    lines = fid.check([fid.ImageSet(folder)], type("Net", (), dict(name="n", sha256="s", channels=3)))
    assert (line in lines) == (suffix != "png")
