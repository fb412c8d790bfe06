"""unpack.py: write the images of a packed data set as files, in the folders that train.py reads.

    python data/unpack.py SOURCE [SOURCE ...] DIR

SOURCE: parquet files of the Hugging Face Hub (they need pyarrow), webdataset's tars, EDM's and StyleGAN's
zips with dataset.json, or a folder of such files. Images go to DIR/CLASS/NAME; without a label (in archives:
.cls, .json or .txt beside the image), they keep their folders. Files are copied verbatim; duplicate names get
a number. DIR appears when it is complete: after an interruption, start again.
"""
import json
import re
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from itertools import groupby
from pathlib import Path, PureWindowsPath

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # finds support/ if this runs as a script
from data.images import IMAGE_SUFFIXES
from support.commands import Parser, UserError, existing_path, one_line, path_name, run_command
from support.files import READ_ERRORS

SUFFIXES = (".parquet", ".zip", ".tar", ".tgz", ".tar.gz")
LABELS = ("label", "labels", "class", "cls")                        # usual names of a label
MAX_BYTES = 2 ** 30                                                 # of a file: larger ones may be zip bombs


def class_folder(label):
    """The folder of a label: 7 is 00007, so that folders sort like labels; in a name, "_" replaces what could
    lead out of the folder or hide it. None without a label: None, "", or -1 as on the Hub."""
    text = str(label) if isinstance(label, (int, str)) else ""
    if text.isdecimal():
        return text.zfill(5)
    return None if text in ("", "-1") else re.sub(r"^\.|[/\\:\0]", "_", text)


# --- Readers yield (class folder or None, name or '', bytes) of each image; `skipped` counts the rest -------

def read_parquet(file, skipped):
    """Read a parquet file. Class names are in the Hub's metadata; equal ones get the label's number."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install pyarrow") from None
    with ParquetFile(file, buffer_size=2 ** 20, pre_buffer=False) as table:         # less than a row group
        schema = table.schema_arrow
        hub = json.loads((schema.metadata or {}).get(b"huggingface", '{"info": {"features": {}}}'))
        names = {name: kind["names"] for name, kind in hub["info"]["features"].items() if "names" in kind}
        images = [field.name for field in schema if "binary" in str(field.type)]
        labels = [column for column in schema.names if column in names or column in LABELS]
        if not images:
            raise UserError(f"{file}: no column of image files among {', '.join(schema.names)}")
        image, label = images[0], labels[0] if labels else None
        folders = [class_folder(name) for name in names.get(label, [])]
        counts = Counter(folder.lower() for folder in folders)
        folders = {k: f"{name} ({k})" if counts[name.lower()] > 1 else name for k, name in enumerate(folders)}
        skipped.update(f"column {name}" for name in schema.names if name not in (image, label))
        for batch in table.iter_batches(32, columns=[image, *labels[:1]]):
            for row in batch.to_pylist():
                data, path, k = row[image], "", row.get(label)
                if isinstance(data, dict):
                    data, path = data["bytes"], data.get("path") or ""
                if data is None:
                    skipped["rows without an image's bytes"] += 1
                else:
                    yield folders.get(k) or class_folder(k), PureWindowsPath(path).name, data


def open_zip(file):
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if not entry.is_dir():
                yield entry.filename, entry.file_size, archive.open(entry)


def open_tar(file):
    with tarfile.open(file) as archive:
        for entry in archive:
            archive.members = []                                    # else tarfile keeps all entries in memory
            if entry.isfile():
                yield entry.name, entry.size, archive.extractfile(entry)
            elif not entry.isdir():
                raise UserError(f"{file}: refused, {entry.name!r} is a link or a device")
        archive.fileobj.seek(archive.offset)                        # damage looks like the end to tarfile
        if archive.fileobj.read(512) != bytes(512):
            raise UserError(f"{file}: damaged or cut short, at byte {archive.offset}")


def read_archive(file, skipped):
    """Read a zip or a tar: consecutive files with the same name up to the first dot are one sample."""
    files = open_zip(file) if file.suffix.lower() == ".zip" else open_tar(file)
    for _, sample in groupby(files, key=lambda item: re.match("(.*/)?[^.]*", item[0])[0]):
        images, label = [], None
        for name, size, stream in sample:
            if size > MAX_BYTES:
                skipped["files above 1 GiB"] += 1
                continue
            data, suffix = stream.read(), Path(name).suffix.lower()
            if suffix in IMAGE_SUFFIXES or name == "dataset.json":
                images.append((name, data))
            elif suffix == ".json":
                record = json.loads(data)
                label = next((record[key] for key in LABELS if key in record), label)
            elif suffix == ".cls" or suffix == ".txt" and data.strip().isdigit():
                label = data.decode().strip()
            else:
                skipped[suffix or "no suffix"] += 1                 # .txt: a caption
        for name, data in images:
            yield class_folder(label), name, data


# --- The command --------------------------------------------------------------------------------------------

def find_files(sources):
    """The packed files of `sources`, files or folders. Raises UserError for none and for different splits."""
    found = []
    for source in map(Path, sources):
        files = sorted(source.rglob("[!.]*")) if source.is_dir() else [source]
        found += [file for file in files if file.name.lower().endswith(SUFFIXES)]
    if not found:
        raise UserError(f"{', '.join(sources)}: no file that ends in {', '.join(SUFFIXES)}")
    splits = {split: str(file) for file in found
              for split in re.findall("(?<![a-z])(train|val|test)", str(file).lower())[-1:]}
    if len(splits) > 1:
        raise UserError(f"{' and '.join(splits.values())} are of different splits: give the files of one, "
                        "python data/unpack.py FILE [FILE ...] DIR")
    return found


def unpack(files, folder):
    """Unpack files to a new folder, atomically, and print a summary. Raises UserError."""
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    skipped, number = Counter(), 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True, desc="unpacking")
    with bar, tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as tmp:
        work = Path(tmp) / "images"
        for file in files:
            reader = read_parquet if file.suffix.lower() == ".parquet" else read_archive
            try:
                for label, name, data in reader(file, skipped):
                    bar.update(len(data))
                    if Path(name).suffix.lower() not in IMAGE_SUFFIXES | {".json"}:
                        name = f"{number:08d}.{'png' if data[1:4] == b'PNG' else 'jpg'}"
                    path = PureWindowsPath(name)                    # knows both separators, and drives
                    if path.anchor or any(part.startswith(".") for part in path.parts):            # ".." too
                        skipped["hidden files or paths out of DIR"] += 1
                        continue
                    target = work / label / path.name if label else work / path.as_posix()
                    while target.exists():
                        target = target.with_name(f"{target.stem}-{number}{target.suffix}")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data)
                    number += target.suffix != ".json"
            except (*READ_ERRORS, tarfile.TarError) as e:
                raise UserError(f"{file}: cannot be unpacked ({one_line(e)})") from None
        summary = ", ".join(f"{kind} ({n})" for kind, n in skipped.most_common(8)) or "nothing"
        if number == 0:
            raise UserError(f"{files[0]}: no images in it; not read: {summary}")
        work.rename(folder)
    folders = sum(entry.is_dir() for entry in folder.iterdir())
    print(f"{folder}: {number} images, {folders} folders; not read: {summary}")


def main():
    parser = Parser(description="Write the images of a packed data set as files, in folders of classes.")
    parser.add_argument("sources", metavar="SOURCE", nargs="+", type=existing_path, help="file, or folder")
    parser.add_argument("folder", metavar="DIR", type=path_name, help="new folder")
    args = parser.parse_args()
    unpack(find_files(args.sources), Path(args.folder))


if __name__ == "__main__":
    run_command(main)
