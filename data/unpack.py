"""unpack.py: the images of a packed data set as files, in the folders that train.py reads.

    python data/unpack.py SOURCE [SOURCE ...] DIR

SOURCE: parquet files as a hub has them (they need pyarrow), webdataset's tars, the zip with dataset.json of
EDM's and StyleGAN's tools, or a folder of such files. Images go to DIR/CLASS/NAME; the class is the label's
name, or its number where the file has no names; in tars it comes from the .cls, .json or .txt beside an image. Without
classes they go to DIR, in the folders that they had. Bytes stay as they are, and names, but for what keeps
equal ones apart.

DIR appears once all is there. Until then the files lie in .DIR.unpacking beside it, each whole; after a kill
the same command goes on.
"""
import hashlib
import json
import os
import re
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path, PureWindowsPath

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # support/ is there when this runs by hand
from data.images import image_suffixes
from support.commands import Parser, UserError, existing_path, one_line, run_command
from support.files import READ_ERRORS, lock

MAGIC = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp",
         b"II*\0": ".tif", b"MM\0*": ".tif"}                             # how files of these formats begin
MOST = 2 ** 30                                                           # bytes of one image: more is a bomb
JOURNAL = ".unpacking"


# --- Names --------------------------------------------------------------------------------------------------

def safe_parts(name, file):
    """The parts of a file's name in an archive, by / or \\. Raises UserError where it leads out of the folder
    that it is unpacked to."""
    path = PureWindowsPath(name)                                        # it knows both separators, and drives
    if path.anchor or ".." in path.parts or not path.parts or "\0" in name:
        raise UserError(f"{file}: refused, it holds a file named {name!r}")
    return path.parts


def class_name(label, names, file):
    """A label's folder: its name in `names` if there are any, else a number as 00007, so that folders sort as
    labels do. None for None and for -1, by which the hub marks the unknown. Raises UserError for a name that
    is no folder's."""
    if label is None or label == -1:
        return None
    if isinstance(label, int):
        if names and not 0 <= label < len(names):
            raise UserError(f"{file}: label {label}, of {len(names)} names")
        label = names[label] if names else f"{label:05d}"
    parts = re.split(r"[/\\]", label)
    if PureWindowsPath(label).anchor or "\0" in label or any(p == "" or p.startswith(".") for p in parts):
        raise UserError(f"{file}: refused, class {label!r} is no folder's name")
    return "_".join(parts)


# --- Readers: each yields (share of the file that is read, class or None, name or None, bytes) of its images.
#     others: a Counter that takes what is not read.

def holds_files(kind):
    """Whether a column of this Arrow type may hold image files: bytes, or a struct of bytes and path."""
    from pyarrow import types
    if types.is_struct(kind):
        return any(kind.field(k).name == "bytes" for k in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind)


def choose_columns(schema, file):
    """(image's column, label's column or None, names of the classes or None) of an Arrow schema: the columns
    that the hub's description in it calls Image and ClassLabel, else the first of files, one of a usual name."""
    hub = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = hub.get("info", {}).get("features", {})
    typed = {name: features.get(name, {}).get("_type") for name in schema.names}
    images = [field.name for field in schema if holds_files(field.type)]
    labels = [name for name in schema.names if typed[name] == "ClassLabel"]
    labels += [name for name in ("label", "labels", "class", "cls") if name in schema.names]
    if not images:
        raise UserError(f"{file}: no column of image files, as bytes or (bytes, path), among "
                        f"{', '.join(schema.names)}")
    image = max(images, key=lambda name: typed[name] == "Image")         # the first of equals
    label = labels[0] if labels else None
    names = features.get(label, {}).get("names")
    if names:                                                            # equal ones would become one class
        often = Counter(name.casefold() for name in names)
        names = [f"{name} ({k})" if often[name.casefold()] > 1 else name for k, name in enumerate(names)]
    return image, label, names


def read_parquet(file, others):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install pyarrow") from None
    with ParquetFile(file, buffer_size=2 ** 20) as table:                # else it reads whole groups of rows
        image, label, names = choose_columns(table.schema_arrow, file)
        columns = [image] if label is None else [image, label]
        others.update(f"column {name}" for name in table.schema_arrow.names if name not in columns)
        row = 0
        for batch in table.iter_batches(32, columns=columns):
            labels = [None] * len(batch) if label is None else batch[label].to_pylist()
            for value, number in zip(batch[image].to_pylist(), labels):
                row += 1
                name = None
                if isinstance(value, dict):
                    name, value = value.get("path"), value["bytes"]
                if value is None:
                    others["rows without an image's bytes"] += 1
                    continue
                name = safe_parts(name, file)[-1] if name else None
                yield row / table.metadata.num_rows, class_name(number, names, file), name, value


def read_zip(file, others):
    with zipfile.ZipFile(file) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        for entry in entries:                                            # all, before the first is written
            safe_parts(entry.filename, file)
        for k, entry in enumerate(entries, 1):
            name = Path(entry.filename)
            if name.suffix.lower() not in image_suffixes() and name.name != "dataset.json":
                others[name.suffix or "no suffix"] += 1
            elif entry.file_size > MOST:
                raise UserError(f"{file}: {name} would have {entry.file_size} bytes")
            else:
                yield k / len(entries), None, entry.filename, archive.read(entry)


def sample_label(texts):
    """The label of a tar's sample: int, name or None. texts: {suffix: text} of what is beside the image."""
    label = texts.get(".cls")
    if label is None and ".json" in texts:
        record = json.loads(texts[".json"])
        for key in ("label", "class", "cls"):
            label = record.get(key, label) if isinstance(record, dict) else None
    if label is None and re.fullmatch(r"\s*\d+\s*", texts.get(".txt", "")):
        label = texts[".txt"]                                            # other text is a caption
    if isinstance(label, str):
        label = label.strip()
        return int(label) if label.isdecimal() else label or None
    return label if type(label) is int else None


def read_tar(file, others):
    """A sample is what follows each other with the same name up to its first dot."""
    total = os.path.getsize(file)
    key, pictures, texts = None, [], {}

    def sample():
        label = class_name(sample_label(texts), None, file)
        if ".txt" in texts and not texts[".txt"].strip().isdecimal():
            others["captions (.txt)"] += 1
        for name, data in pictures:
            yield stream.tell() / total, label, name, data

    with open(file, "rb") as stream, tarfile.open(fileobj=stream) as archive:
        while True:
            entry = archive.next()
            archive.members.clear()                                      # else all that were read are kept
            if entry is None:
                break
            if entry.isdir():
                continue
            folder, name = os.path.split(entry.name)
            if not entry.isfile():
                raise UserError(f"{file}: refused, {entry.name!r} in it is a link or a device")
            safe_parts(entry.name, file)
            if (folder, name.split(".")[0]) != key:
                yield from sample()
                key, pictures, texts = (folder, name.split(".")[0]), [], {}
            suffix = Path(name).suffix.lower()
            if suffix not in image_suffixes() | {".cls", ".json", ".txt"}:
                others[suffix or "no suffix"] += 1
                continue
            if entry.size > MOST:
                raise UserError(f"{file}: {entry.name} would have {entry.size} bytes")
            data = archive.extractfile(entry).read()
            if suffix in image_suffixes():
                pictures.append((entry.name, data))
            else:
                texts[suffix] = data.decode(errors="replace")
        yield from sample()
        archive.fileobj.seek(archive.offset)                           # tarfile takes any rubbish for the end
        if archive.fileobj.read(512) != bytes(512):
            raise UserError(f"{file}: damaged or cut short, at byte {archive.offset}")


READERS = {".parquet": read_parquet, ".zip": read_zip,
           ".tar": read_tar, ".tgz": read_tar, ".tar.gz": read_tar}


def reader_of(file):
    """The reader of a file by its name, None where it has none."""
    for suffix, reader in READERS.items():
        if file.name.lower().endswith(suffix) and not file.name.startswith("."):
            return reader
    return None


def find_files(sources):
    """The packed files among and under `sources`, each source's sorted. Raises UserError where one has none,
    and where they are of different splits, which would be mixed."""
    found, splits = [], {}
    for source in map(Path, sources):
        files = sorted(source.rglob("*")) if source.is_dir() else [source]
        files = [file for file in files if file.is_file() and reader_of(file)]
        if not files:
            raise UserError(f"{source}: no file that ends in {', '.join(READERS)}")
        for file in files:
            name = file.relative_to(source).as_posix() if source.is_dir() else file.name
            split = re.search(r"(?<![a-z])(train|val|test)", name.lower())
            if split:
                splits[split[1]] = file
        found += files
    if len(splits) > 1:
        raise UserError(f"{' and '.join(map(str, splits.values()))} are of different splits: give the files "
                        "of one, python data/unpack.py FILE [FILE ...] DIR")
    return found


# --- Writing ------------------------------------------------------------------------------------------------

def place(work, label, name, data, number):
    """Where an image goes below `work`: a name that nothing has yet. number: of the image, from 0."""
    parts = safe_parts(name or f"{number:08d}", work)
    if Path(parts[-1]).suffix.lower() not in image_suffixes() and parts[-1] != "dataset.json":
        suffixes = [suffix for magic, suffix in MAGIC.items() if data.startswith(magic)]
        suffixes.append(".jpg")                                          # no image: train.py will name it
        parts = (*parts[:-1], parts[-1] + suffixes[0])
    target = work.joinpath(*parts) if label is None else work / label / parts[-1]
    while target.exists():
        target = target.with_name(f"{target.stem}-{number}{target.suffix}")
    return target


def write(file, data):
    """Write bytes, and their file's folder, so that after a kill the file is whole or absent (not synced:
    there may be a million). Raises UserError."""
    tmp = file.parent / f"{JOURNAL}.tmp"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tmp.write_bytes(data)
        tmp.replace(file)
    except OSError as e:
        raise UserError(f"cannot write {file}: {e.strerror}") from None


def write_images(files, work, others):
    """Write the images of packed files below `work`; returns their number. The journal there says which image
    is on its way where: after a kill that one is written again, and none twice. Raises UserError."""
    sizes = [file.stat().st_size for file in files]
    sources = [[str(file.resolve()), size] for file, size in zip(files, sizes)]
    digest = hashlib.sha256(json.dumps(sources).encode()).hexdigest()
    at = dict(source=digest, file=0, item=0, number=0, target="")
    begun = dict(at)
    if (work / JOURNAL).is_file():
        begun = json.loads((work / JOURNAL).read_text())
        if begun["source"] != digest:
            raise UserError(f"{work}: begun from other files; delete it to start afresh")
    number = begun["number"]
    before = sum(sizes[:begun["file"]])
    bar = tqdm(total=sum(sizes), initial=before, unit="B", unit_scale=True, desc="unpacking")
    for k in range(begun["file"], len(files)):
        reader = reader_of(files[k])
        try:
            for item, (share, label, name, data) in enumerate(reader(files[k], others)):
                bar.update(round(sum(sizes[:k]) + share * sizes[k]) - bar.n)
                if (k, item) < (begun["file"], begun["item"]):
                    continue
                if name and any(part.startswith(".") for part in safe_parts(name, files[k])):
                    others["hidden files"] += 1
                    continue
                target = place(work, label, name, data, number)
                if (k, item) == (begun["file"], begun["item"]) and begun["target"]:
                    target = work / begun["target"]
                at |= dict(file=k, item=item, number=number, target=target.relative_to(work).as_posix())
                write(work / JOURNAL, json.dumps(at).encode())
                write(target, data)
                number += target.name != "dataset.json"
        except (*READ_ERRORS, tarfile.TarError) as e:
            raise UserError(f"{files[k]}: cannot be read ({one_line(e)})") from None
    bar.close()
    return number


def unpack(files, folder):
    """Unpack files to a new folder, which appears once all is there; returns (the number of images, what was
    not read, in words). Raises UserError."""
    work, others = folder.with_name(f".{folder.name}.unpacking"), Counter()
    held = lock(work, "wait for it, or name another DIR")
    try:
        number = write_images(files, work, others)
        kinds = ", ".join(f"{name} ({n})" for name, n in others.most_common(8))
        if number == 0:
            raise UserError(f"{files[0]}: no images in it, {kinds or 'it is empty'}")
    except UserError as e:
        if (work / JOURNAL).exists():
            raise UserError(f"{e}; what was unpacked before is in {work}") from None
        (work / ".lock").unlink()
        work.rmdir()
        raise
    held.close()
    work.rename(folder)
    for name in (JOURNAL, ".lock"):
        (folder / name).unlink(missing_ok=True)
    return number, kinds


def main():
    parser = Parser(description="Write the images of a packed data set as files, in folders of classes.")
    parser.add_argument("sources", metavar="SOURCE", nargs="+", type=existing_path,
                        help="a .parquet, .zip or .tar file, or a folder of them")
    parser.add_argument("folder", metavar="DIR", help="a new folder")
    args = parser.parse_args()
    folder = Path(os.path.abspath(args.folder))
    if folder.exists():
        raise UserError(f"{args.folder}: exists already; name a new folder")
    number, not_read = unpack(find_files(args.sources), folder)
    folders = sum(entry.is_dir() for entry in folder.iterdir())
    print(f"{args.folder}: {number} images, {folders} folders; not read: {not_read or 'nothing'}")


if __name__ == "__main__":
    run_command(main)
