"""data/unpack.py: what train.py then reads has the labels and the bytes of the packed data set."""
import contextlib
import io
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import needs, one_line
from data import images, unpack
from support.commands import run_command


def encoded(k, kind="PNG"):
    """The bytes of an image, a different one for each k."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (16, 16, 3), np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(*words): run unpack.py in tmp_path, where it must succeed or, with fails=True, end with an error;
    returns what it printed."""
    def call(*words, fails=False):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["unpack.py", *words])
        with pytest.raises(SystemExit) if fails else contextlib.nullcontext():
            run_command(unpack.main)
        return "".join(capsys.readouterr())
    return call


def read(folder):
    """{class: sorted bytes of its files} as the data set of train.py sees a folder."""
    data = images.ImageFolder(folder, 8)
    found = {name: [] for name in data.classes}
    for path, label in zip(data.files, data.labels, strict=True):
        found[data.classes[label]].append(Path(os.fsdecode(path)).read_bytes())
    return {name: sorted(files) for name, files in found.items()}


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_parquet(file, columns, names=None):
    """Write a parquet file; names: of the classes, in the metadata of the Hub."""
    import pyarrow
    from pyarrow.parquet import write_table
    table = pyarrow.table(columns)
    if names:
        features = {"image": {"_type": "Image"}, "fine": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(exist_ok=True)
    write_table(table, file)


def write_zip(file, entries):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def write_tar(file, entries, mode="w"):
    with tarfile.open(file, mode) as archive:
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            data = data if isinstance(data, bytes) else data.encode()
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@needs("pyarrow")
def test_parquet_with_class_names(tmp_path, call):
    """Two shards, more rows than a batch, a class name that leads out of the folder, and two equal ones."""
    names = ["tench, Tinca tinca", "../C/V", "unused", "crane", "Crane"]
    folders = {0: "tench, Tinca tinca", 1: "_._C_V", 3: "crane (3)", 4: "Crane (4)"}
    labels = [[0, 1, 3, 4][k % 4] for k in range(101)]
    files = [dict(bytes=encoded(k, "JPEG"), path=f"some/n_{k}.JPEG") for k in range(101)]
    for k, part in enumerate((slice(70), slice(70, None))):
        columns = dict(image=files[part], fine=labels[part], caption=["a fish"] * len(files[part]))
        write_parquet(tmp_path / f"hub/train-{k:05d}.parquet", columns, names)
    assert "out: 101 images, 4 folders; not read: column caption (2)" in call("hub", "out")
    for k, label in enumerate(labels):
        assert (tmp_path / f"out/{folders[label]}/n_{k}.JPEG").read_bytes() == files[k]["bytes"]
    one_line(call("hub", "out", fails=True), "exists already")


@needs("pyarrow")
def test_parquet_without_class_names(tmp_path, call):
    """Bytes without names; labels -1 (unknown) and an image without bytes."""
    data = [encoded(k, ["PNG", "JPEG"][k % 2]) for k in range(5)]
    write_parquet(tmp_path / "a.parquet", dict(jpg=[*data, None], label=[0, 5, 10, -1, -1, 5]))
    assert "not read: rows without an image's bytes (1)" in call("a.parquet", "out")
    names = ["00000/00000000.png", "00005/00000001.jpg", "00010/00000002.png", "00000003.jpg", "00000004.png"]
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == data


@needs("pyarrow")
def test_parquet_needs_pyarrow_and_an_image_column(tmp_path, call, monkeypatch):
    write_parquet(tmp_path / "a.parquet", dict(text=["a"], label=[1]))
    one_line(call("a.parquet", "out", fails=True), "a.parquet: no column of image files among text, label")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)                # as if it were not installed
    one_line(call("a.parquet", "out", fails=True), "pip install pyarrow")


def test_splits_are_not_mixed(tmp_path, call):
    (tmp_path / "hub").mkdir()
    for split in ("train", "validation"):
        write_tar(tmp_path / f"hub/{split}-0.tar", {"a.png": encoded(0)})
    one_line(call("hub", "out", fails=True), "different splits", "train-0", "validation-0")


def test_zip_with_dataset_json(tmp_path, call):
    """As EDM's dataset_tool.py writes it: the labels are in dataset.json, not in folders."""
    names = [f"{k // 2:05d}/img{k:08d}.png" for k in range(10)]
    entries = {name: encoded(k) for k, name in enumerate(names)}
    table = json.dumps({"labels": [[name, 7 - k % 3] for k, name in enumerate(names)]})
    others = {"dataset.json": table, "readme.md": "", "mac/": "", "mac/._a.png": ""}
    write_zip(tmp_path / "set.zip", entries | others)
    assert "out: 10 images, 5 folders; not read: .md (1), hidden files or" in call("set.zip", "out")
    assert tree(tmp_path / "out") == sorted([*names, "dataset.json"])
    assert read(tmp_path / "out") == {str(7 - k): sorted(list(entries.values())[k::3]) for k in range(3)}


@pytest.mark.parametrize("suffix, beside", [
    ("cls", "{0}\n"), ("json", '{{"label": {0}, "caption": "b"}}'), ("cls", "{1}")])
def test_webdataset(suffix, beside, tmp_path, call):
    """Two shards with the same names; the label before or after the image."""
    expected = {}
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        entries = {}
        for k in range(4):
            text, data = beside.format(11 * (k % 2), ["dog", "cat"][k % 2]), encoded(4 * shard + k, "JPEG")
            pair = [(f"./{k}.{suffix}", text), (f"./{k}.a.jpg", data)]
            entries |= dict(pair if shard else reversed(pair))
            folder = text if "1" in beside else f"{11 * (k % 2):05d}"
            expected.setdefault(folder, []).append(data)
        write_tar(tmp_path / f"shards/set-{shard}.tar", entries)
    call("shards", "out")
    assert read(tmp_path / "out") == {name: sorted(files) for name, files in expected.items()}


def test_tar_with_class_folders_and_captions(tmp_path, call):
    """Names with more than one dot; a text that is not read."""
    entries = {f"set/{name}/photo.{k}.png": encoded(k) for name in ("one", "two") for k in range(2)}
    write_tar(tmp_path / "set.tar.gz", entries | {"a.txt": "a fish"}, "w:gz")
    assert "4 images, 1 folders; not read: .txt (1)" in call("set.tar.gz", "out")
    assert tree(tmp_path / "out") == sorted(entries)


# --- Hostile and damaged files ------------------------------------------------------------------------------

@needs("pyarrow")
@pytest.mark.parametrize("name", ["../../x.png", "/tmp/x.png", "C:x.png", "..\\x.png"])
def test_names_that_lead_out_of_the_folder(name, tmp_path, call):
    write_tar(tmp_path / "x.tar", {"ok.png": encoded(0), name: encoded(1)})
    write_zip(tmp_path / "x.zip", {"ok.png": encoded(0), name: encoded(1)})
    write_parquet(tmp_path / "x.parquet", dict(image=[dict(bytes=encoded(1), path=name)]))
    for source in ("x.tar", "x.zip"):
        assert "1 images, 0 folders; not read: hidden files or paths out" in call(source, f"a/{source}")
    call("x.parquet", "a/out")
    assert tree(tmp_path / "a") == ["out/x.png", "x.tar/ok.png", "x.zip/ok.png"]


def test_links_and_devices_are_refused(tmp_path, call):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("x.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    one_line(call("x.tar", "out", fails=True), "'x.png' is a link or a device")


@needs("pyarrow")
def test_damaged_archives(tmp_path, call):
    """Cut at a header, in an image; a wrong header; another format. Nothing is left behind."""
    write_tar(tmp_path / "a.tar", {"1.png": encoded(1), "2.png": encoded(2)})
    data = (tmp_path / "a.tar").read_bytes()
    second = data.index(b"2.png")
    for name, damaged, words in (("a.tar", data[:second], "cut short, at byte"),
                                 ("a.tar", data[:second + 900], "unexpected end of data"),
                                 ("a.tar", data[:second] + b"x" * 9 + data[second + 9:], "damaged"),
                                 ("a.zip", data, "not a zip"), ("a.parquet", data, "magic bytes")):
        (tmp_path / name).write_bytes(damaged)
        one_line(call(name, "out", fails=True), f"{name}: ", words)
    assert len(list(tmp_path.iterdir())) == 3


def test_zip_bomb_is_not_read(tmp_path, call, monkeypatch):
    monkeypatch.setattr(unpack, "MAX_BYTES", 10_000)
    write_zip(tmp_path / "x.zip", {"x.png": bytes(10_001)})
    one_line(call("x.zip", "out", fails=True), "x.zip: no images in it; not read: files above 1 GiB (1)")
