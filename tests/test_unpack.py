"""data/unpack.py: what train.py then reads has the labels and the bytes of the packed data set."""
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import images, unpack
from support import commands
from conftest import ROOT, needs, one_line


def picture(k, kind="PNG", size=16):
    """The bytes of a picture, another one for each k."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (size, size, 3), np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(*flags): unpack.py in tmp_path, its exit code checked; returns what it printed."""
    def call(*flags, code=0):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["unpack.py", *map(str, flags)])
        capsys.readouterr()
        ended = 0
        try:
            commands.run_command(unpack.main)
        except SystemExit as e:
            ended = e.code
        out, err = capsys.readouterr()
        assert ended == code, out + err
        return out + err
    return call


def read(folder):
    """{class: sorted bytes of its files} as train.py's data set sees a folder."""
    data = images.ImageFolder(folder, 8)
    found = {name: [] for name in data.classes}
    for path, label in zip(data.files, data.labels):
        found[data.classes[label]].append(Path(os.fsdecode(path)).read_bytes())
    return {name: sorted(files) for name, files in found.items()}


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- Parquet ------------------------------------------------------------------------------------------------

def write_parquet(file, rows, names=None, image="image", label="label", **more):
    """rows: [(path or None, bytes, label)], in the form of the hub's; names: of the classes."""
    import pyarrow.parquet
    columns = {image: [dict(bytes=data, path=path) for path, data, _ in rows], label: [k for *_, k in rows], **more}
    table = pyarrow.table(columns)
    features = {image: {"_type": "Image"}}
    if names:
        features[label] = {"names": names, "_type": "ClassLabel"}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, file)


@needs("pyarrow")
def test_parquet_with_names_and_paths(tmp_path, call):
    """Shards in a folder, 101 rows, more than a batch; names of classes and of files as they were."""
    names = ["tench, Tinca tinca", "Ram C/V Cargo Van", "unused", "crane", "Crane"]
    rows = [(f"some/n_{k}.JPEG", picture(k, "JPEG"), [0, 1, 3, 4][k % 4]) for k in range(101)]
    for shard, part in enumerate((rows[:70], rows[70:])):
        write_parquet(tmp_path / f"hub/data/train-{shard:05d}-of-00002.parquet", part, names,
                      caption=["a fish"] * len(part))
    out = call("hub", "out")
    assert "out: 101 images, 4 folders; not read: column caption (2)" in out
    folders = {0: "tench, Tinca tinca", 1: "Ram C_V Cargo Van", 3: "crane (3)", 4: "Crane (4)"}
    expected = {folders[k]: sorted(data for _, data, label in rows if label == k) for k in folders}
    assert read(tmp_path / "out") == expected
    assert tree(tmp_path / "out") == sorted(f"{folders[k]}/{Path(path).name}" for path, _, k in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "out"]
    one_line(call("hub", "out", code=2), "exists already")


@needs("pyarrow")
def test_parquet_without_names(tmp_path, call):
    """Plain bytes in a column, numbers for labels: folders that sort as the numbers do, suffixes by content."""
    import pyarrow.parquet
    kinds = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]
    data, labels = [picture(k, kinds[k % 6]) for k in range(12)], [k // 4 * 5 for k in range(12)]     # 0, 5, 10
    pyarrow.parquet.write_table(pyarrow.table(dict(jpg=data, label=labels)), tmp_path / "a.parquet")
    call("a.parquet", "out")
    assert read(tmp_path / "out") == {name: sorted(data[first:first + 4]) for name, first in
                                      (("00000", 0), ("00005", 4), ("00010", 8))}
    assert tree(tmp_path / "out")[:4] == ["00000/00000000.png", "00000/00000001.jpg", "00000/00000002.gif",
                                          "00000/00000003.webp"]
    write_parquet(tmp_path / "test.parquet", [(None, data[0], -1), ("b", data[1], -1)], ["x", "y"])   # no labels known
    call("test.parquet", "flat")
    assert tree(tmp_path / "flat") == ["00000000.png", "b.jpg"] and list(read(tmp_path / "flat")) == ["all"]


@needs("pyarrow")
def test_parquet_needs_a_column_of_image_files(tmp_path, call):
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table(dict(text=["a"], label=[1])), tmp_path / "a.parquet")
    one_line(call("a.parquet", "out", code=2), "a.parquet: no column of image files", "among text, label")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 rubbish")
    one_line(call("b.parquet", "out", code=2), "b.parquet: cannot be read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_parquet_without_pyarrow(tmp_path, call, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)                # as if it were not installed
    one_line(call("a.parquet", "out", code=2), "pip install pyarrow")
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@needs("pyarrow")
def test_splits_are_not_mixed(tmp_path, call):
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"hub/{split}-00000-of-00001.parquet", [("a.png", picture(0), 0)], ["x"])
    one_line(call("hub", "out", code=2), "different splits", "train-00000", "validation-00000")
    call(*(tmp_path / "hub").glob("train*"), "out")
    assert tree(tmp_path / "out") == ["x/a.png"]


# --- Zip ----------------------------------------------------------------------------------------------------

def write_zip(file, entries):
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def test_zip_with_its_dataset_json(tmp_path, call):
    """As EDM's dataset_tool.py writes it: numbers of classes in dataset.json, which counts, not in folders."""
    names = [f"{k // 1000:05d}/img{k:08d}.png" for k in range(0, 5000, 500)]
    entries = {name: picture(k) for k, name in enumerate(names)}
    table = json.dumps({"labels": [[name, 7 - k % 3] for k, name in enumerate(names)]})
    write_zip(tmp_path / "set.zip", entries | {"dataset.json": table, "readme.md": "", "__MACOSX/._img.png": "x"})
    out = call("set.zip", "out")
    assert "10 images" in out and ".md (1)" in out and "hidden files (1)" in out
    assert tree(tmp_path / "out") == sorted([*names, "dataset.json"])
    assert (tmp_path / "out/dataset.json").read_text() == table
    files = list(entries.values())
    assert read(tmp_path / "out") == {"5": sorted(files[2::3]), "6": sorted(files[1::3]), "7": sorted(files[::3])}


def test_zip_of_arrays_holds_no_images(tmp_path, call):
    write_zip(tmp_path / "latents.zip", {"dataset.json": "{}", "a.npy": "x", "b.npy": "y"})
    one_line(call("latents.zip", "out", code=2), "no images in it, .npy (2)")
    assert not (tmp_path / "out").exists()


# --- Tar ----------------------------------------------------------------------------------------------------

def write_tar(file, entries, mode="w"):
    with tarfile.open(file, mode) as archive:
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            data = data if isinstance(data, bytes) else data.encode()
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("how", ["cls", "json", "txt", "names"])
def test_webdataset(how, tmp_path, call):
    """Shards that repeat their names; the class before or after its image."""
    expected = {}
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        entries = {}
        for k in range(8):
            key, data, label = f"./{k:04d}", picture(8 * shard + k, "JPEG"), 11 * (k % 2)
            beside = {"cls": (".cls", f"{label}\n"), "json": (".json", json.dumps(dict(label=label, caption="b"))),
                      "txt": (".txt", str(label)), "names": (".cls", "cat" if label else "dog")}[how]
            pair = [(key + beside[0], beside[1]), (key + ".jpg", data)]
            entries |= dict(pair if shard else reversed(pair))
            expected.setdefault({0: "dog", 11: "cat"}[label] if how == "names" else f"{label:05d}", []).append(data)
        write_tar(tmp_path / f"shards/set-{shard:06d}.tar", entries)
    call("shards", "out")
    assert read(tmp_path / "out") == {name: sorted(files) for name, files in expected.items()}
    first = min(expected)
    assert len(tree(tmp_path / "out")) == 24 and (tmp_path / "out" / first).exists()
    first_names = sorted(re.sub("-[0-9]+", "", path.name) for path in (tmp_path / "out").rglob("*.jpg"))
    assert first_names == sorted(f"{k:04d}.jpg" for k in range(8) for _ in range(3))


def test_captions_are_told(tmp_path, call):
    write_tar(tmp_path / "a.tar", {"1.jpg": picture(1, "JPEG"), "1.txt": "a fish", "2.jpg": picture(2, "JPEG"),
                                   "2.txt": "a cat", "2.npy": "x"})
    assert "2 images, 0 folders; not read: captions (.txt) (2), .npy (1)" in call("a.tar", "out")
    assert list(read(tmp_path / "out")) == ["all"]


def test_a_tar_of_class_folders(tmp_path, call):
    """No webdataset, but what `tar czf` makes of folders: they stay, names with dots in them too."""
    entries = {f"set/{name}/photo.{k}.png": picture(k) for name in ("one", "two") for k in range(3)}
    write_tar(tmp_path / "set.tar.gz", entries, "w:gz")
    call("set.tar.gz", "out")
    assert tree(tmp_path / "out") == sorted(entries) and list(read(tmp_path / "out/set")) == ["one", "two"]


# --- Hostile names ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["../../x.png", "/tmp/x.png", "a/../../x.png", "C:\\x.png", "..\\x.png",
                                  "\\\\host\\x.png", "C:x.png"])
@pytest.mark.parametrize("source", ["x.tar", "x.zip", pytest.param("x.parquet", marks=needs("pyarrow"))])
def test_names_that_lead_elsewhere_are_refused(source, name, tmp_path, call):
    inside = tmp_path / "a/b"
    inside.mkdir(parents=True)
    if source == "x.tar":
        write_tar(tmp_path / source, {"ok.png": picture(0), name: picture(1)})
    elif source == "x.zip":
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        with zipfile.ZipFile(tmp_path / source, "w") as archive:
            archive.writestr("ok.png", picture(0))
            archive.writestr(info, picture(1))
    else:
        write_parquet(tmp_path / source, [("ok.png", picture(0), 0), (name, picture(1), 0)], ["one"])
    one_line(call(source, f"a/b/{source}", code=2), source, "refused, it holds a file named")
    left = [path for path in tree(tmp_path) if path != source]
    assert all(path.startswith("a/b/.x.") for path in left) and not Path("/tmp/x.png").exists()
    assert not any("x.png" in path for path in left)


@needs("pyarrow")
def test_classes_that_lead_elsewhere_are_refused(tmp_path, call):
    for name in ("../../x", "/x", "..", "", ".git", "C:x"):
        write_parquet(tmp_path / "x.parquet", [("ok.png", picture(0), 0)], [name])
        one_line(call("x.parquet", "out", code=2), "is no folder's name")
        assert tree(tmp_path) == ["x.parquet"]


def test_links_and_devices_are_refused(tmp_path, call):
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            info = tarfile.TarInfo("x.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        one_line(call("x.tar", "out", code=2), "'x.png' in it is a link or a device")
        assert tree(tmp_path) == ["x.tar"]


# --- Kills, damage, size ------------------------------------------------------------------------------------

def write_big(file):
    """The same 600 pictures in each form, many of one name; {class: sorted bytes of its files}."""
    rows = [(f"{k % 50}.png", picture(k), k % 3) for k in range(600)]
    if file.suffix == ".parquet":
        write_parquet(file, rows, ["x", "y", "z"])
    elif file.suffix == ".zip":
        write_zip(file, {f"{'xyz'[k % 3]}/{k}.png": data for k, (_, data, _) in enumerate(rows)})
    else:
        entries = {}
        for k, (name, data, label) in enumerate(rows):
            entries |= {f"{k // 50}/{name}": data, f"{k // 50}/{name[:-4]}.cls": "xyz"[label]}
        write_tar(file, entries)
    return {name: sorted(data for _, data, label in rows if "xyz"[label] == name) for name in "xyz"}


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("source", [pytest.param("a.parquet", marks=needs("pyarrow")), "a.zip", "a.tar"])
def test_a_killed_run_goes_on(source, tmp_path, call):
    """Killed at any write, five times: no file is half, none is there twice, none is missing."""
    expected = write_big(tmp_path / source)
    (tmp_path / "dying.py").write_text(
        "import os, signal, sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nfrom data import unpack\n"
        "left = int(sys.argv.pop(1))\n"
        "def dying(method):\n"
        "    def call(self, *args):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left < 0:\n"
        "            if method is WRITE: method(self, args[0][:len(args[0]) // 2])\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return method(self, *args)\n"
        "    return call\n"
        "WRITE = Path.write_bytes\n"
        "Path.write_bytes, Path.replace = dying(Path.write_bytes), dying(Path.replace)\nunpack.main()\n")
    work, seen = tmp_path / ".out.unpacking", set()
    for writes in (0, 1, 2, 401, 7):                                         # an image's two, and between images
        done = subprocess.run([sys.executable, "dying.py", str(writes), source, "out"], cwd=tmp_path,
                              capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
        assert not (tmp_path / "out").exists()
        there = {path: path.read_bytes() for path in work.rglob("*.png")}
        assert set(there.values()) <= {data for files in expected.values() for data in files}      # whole, each
        assert len(set(there.values())) == len(there) and seen <= set(there)
        seen = set(there)
    assert len(seen) > 200
    call(source, "out")
    assert read(tmp_path / "out") == expected and not work.exists()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith(".")]


def test_another_source_does_not_go_on(tmp_path, call):
    write_tar(tmp_path / "a.tar", {"1.png": picture(1), "2.png": picture(2)})
    whole = (tmp_path / "a.tar").read_bytes()
    second = whole.index(b"2.png")
    for part, what in ((whole[:second], "damaged or cut short, at"), (whole[:second + 200], "damaged or cut short"),
                       (whole[:second + 900], "cannot be read (unexpected end of data)"),
                       (whole[:second] + b"rubbish" + whole[second + 7:], "damaged or cut short")):
        (tmp_path / "a.tar").write_bytes(part)
        one_line(call("a.tar", f"out{len(part)}{what[0]}", code=2), f"a.tar: {what}", ".unpacking")
    one_line(call("a.tar", "out", code=2), "damaged")
    assert not (tmp_path / "out").exists() and "1.png" in tree(tmp_path / ".out.unpacking")
    write_tar(tmp_path / "b.tar", {"1.png": picture(3)})
    one_line(call("b.tar", "out", code=2), "begun from other files; delete it")


def test_a_second_one_at_the_same_time_is_refused(tmp_path, call):
    write_tar(tmp_path / "a.tar", {"1.png": picture(1)})
    (tmp_path / ".out.unpacking").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys\nf = open('.out.unpacking/.lock', 'w')\n"
                               "fcntl.lockf(f, fcntl.LOCK_EX)\nprint(1, flush=True)\nsys.stdin.read()"], cwd=tmp_path,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    one_line(call("a.tar", "out", code=2), "wait for it, or name another DIR")
    holder.communicate()
    call("a.tar", "out")
    assert tree(tmp_path / "out") == ["1.png"]


def test_a_bomb_is_refused(tmp_path, call, monkeypatch):
    monkeypatch.setattr(unpack, "MOST", 10_000)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.png", bytes(10_001))
    write_tar(tmp_path / "x.tgz", {"x.png": bytes(10_001)}, "w:gz")
    for source in ("x.zip", "x.tgz"):
        one_line(call(source, "out", code=2), f"{source}: x.png would have 10001 bytes")
