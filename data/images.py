"""images.py: the pictures to train on and to judge by: found, read, cropped, sorted into classes and batches.

Images are uint8 [3, H, W], in batches [B, 3, H, W].
"""
import argparse
import json
import math
import multiprocessing
import os
import pickle
import signal
import tempfile
import unicodedata
import warnings
from collections import Counter, defaultdict
from multiprocessing.connection import Listener
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.commands import STOP_SIGNALS, UserError, existing_folder, one_line
from support.files import READ_ERRORS, is_whole_archive, write_atomic

warnings.filterwarnings("ignore", module="PIL")      # it tells of what it reads all the same, in each process

# --- Files --------------------------------------------------------------------------------------------------

PACKED = {".parquet", ".tar", ".tgz", ".zip"}             # data sets in a few files, for data/unpack.py
NO_PICTURES = {"BUFR", "EPS", "FITS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}  # data, documents


def image_suffixes():
    """The suffixes of image files, in lower case: those that Pillow registers for pictures and can open."""
    return {suffix for suffix, kind in Image.registered_extensions().items()
            if kind not in NO_PICTURES and (kind in Image.OPEN or kind == "MPO")}        # MPO opens as JPEG


def how_to_unpack(path, suffixes):
    """What to type where data comes in files of these suffixes, as the end of an error's line; else ''."""
    return f"; python data/unpack.py {path} DIR writes its images to DIR" if PACKED & set(suffixes) else ""


def image_folder(text):
    """argparse's type of a folder of images."""
    try:
        return existing_folder(text)
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(f"{e}{how_to_unpack(text, [Path(text).suffix.lower()])}") from None


def several_frames(folder, files):
    """A line for people on a folder's images of several frames, of which one is read; '' where none is found
    among the first hundred files whose format has frames."""
    animated, files = 0, [f for f in files if f.suffix.lower() in (".apng", ".gif", ".tif", ".tiff", ".webp")]
    for file in files[:100]:
        try:
            with Image.open(file) as image:
                animated += getattr(image, "n_frames", 1) > 1
        except READ_ERRORS:
            pass                                                      # told where it is read
    return f"{folder}: images of several frames in it; the first frame of each is read" if animated else ""


def list_images(folder, others=None):
    """Every image file under `folder`, sorted: those of `image_suffixes`, none that is hidden, no link to
    nothing or to a folder it stands in. others: a Counter that takes the suffixes of files that are no
    images. Raises UserError where no image is."""
    suffixes = image_suffixes()
    found, others, folders = [], Counter() if others is None else others, [(str(folder), ())]
    while folders:
        root, above = folders.pop()
        try:
            entries, here = list(os.scandir(root)), os.path.realpath(root)
        except OSError as e:
            reason = f"no such folder, or not readable ({e.strerror})"
            raise UserError(f"{root}: {reason}{how_to_unpack(root, [Path(root).suffix.lower()])}") from None
        if here in above:
            continue
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(".") or entry.is_symlink() and not os.path.exists(entry.path):
                continue
            if entry.is_dir():
                folders.append((entry.path, (*above, here)))
            elif suffix in suffixes and entry.is_file():
                found.append(entry.path)
            else:
                others[suffix or "no suffix"] += 1
    if not found:
        kinds = ", ".join(f"{n} of {suffix}" for suffix, n in others.most_common(5))
        advice = how_to_unpack(folder, others)
        if ".npy" in others:
            advice = "; arrays are not read, images are (PNG, JPEG and all that Pillow opens)"
        raise UserError(f"{folder}: no images in it, {kinds or 'it is empty'}{advice}")
    return [Path(path) for path in sorted(found, key=lambda path: path.split(os.sep))]


def nfc(name):
    """A name in Unicode's composed form (NFC); a Mac may store a letter and its accent apart (NFD)."""
    return unicodedata.normalize("NFC", name)


def list_classes(folder):
    """{class name, in NFC: its image files, sorted}; the k-th class is label k. DIR/CLASS/** has classes by
    name; where DIR holds dataset.json (of EDM's and StyleGAN's tools), its "labels", [file, number] pairs,
    count; a folder of images alone is one class. Raises UserError."""
    root, table, classes, others = Path(folder), Path(folder) / "dataset.json", defaultdict(list), Counter()
    files = list_images(root, others)
    beside = [suffix for suffix in (".txt", ".jsonl", ".csv", ".npy") if suffix in others]
    if beside:
        kinds = ", ".join(f"{others[suffix]} of {suffix}" for suffix in beside)
        tqdm.write(f"{folder}: captions, tables and arrays are not read ({kinds}); classes are folders, or "
                   "the labels in dataset.json")
    frames = several_frames(folder, files)
    if frames:
        tqdm.write(frames)
    if table.is_file():
        try:
            labels = dict(json.loads(table.read_bytes())["labels"] or {})
            labels = {nfc(name): label for name, label in labels.items()} | labels
            for path in files:
                name = path.relative_to(root).as_posix()
                label = float(labels.get(name, labels[nfc(name)])) if labels else 0.0
                if not label.is_integer():
                    raise ValueError(f"{name} has label {label:g}")
                classes[int(label)].append(path)
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as e:
            raise UserError(f"{table}: not [file, number] of every image in labels: {one_line(e)}") from None
        return {str(label): classes[label] for label in sorted(classes)}
    for path in files:
        inside = path.parts[len(root.parts):]
        classes[nfc(inside[0]) if len(inside) > 1 else ""].append(path)
    beside = classes.pop("", [])
    if not classes:
        return {"all": beside}
    empty = {nfc(p.name) for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")} - set(classes)
    if empty:
        raise UserError(f"{root / min(empty)}: no images in this class folder; take it away")
    if beside:
        tqdm.write(f"warning: {folder}: {len(beside)} images beside the class folders are left out")
    if {"train", "val"} <= set(classes):
        tqdm.write(f"warning: train and val in {folder} are taken for classes; is {folder}/train meant?")
    return dict(sorted(classes.items()))


# --- One image ----------------------------------------------------------------------------------------------

def center_crop(image, size):
    """ADM's crop: box-halve a PIL image while its sides are >= 2 * size, bicubic to size, cut the middle.
    Raises ValueError for an image so thin that it is enlarged beyond Pillow's limit of 89 million pixels."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"so thin that it is enlarged to {width} x {height} pixels")
    image = image.resize((width, height), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def grey_to_8_bits(image):
    """A grey PIL image of mode I, I;16 or F as mode L, its transparent value white. Integers have 16 bits (12
    in some TIFFs), floats in [0, 1], or in [0, 255] where they exceed 2. Raises ValueError for others."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})                     # TIFF's tags
    margin, white = 0, 4095 if tags.get(258) == (12,) else 65535                       # bits per sample
    if image.mode == "F":
        margin, white = 255, 1 if values.max() <= 2 else 255                           # resizing overshoots
    grey = values / (white / 255)
    if not (-margin <= grey.min() and grey.max() <= 255 + margin):                     # nor is NaN
        raise ValueError(f"grey values from {values.min():g} to {values.max():g}")
    if tags.get(262) == 0:                                                             # 0 stands for white
        grey = 255 - grey
    if "transparency" in image.info:
        grey = np.where(values == image.info["transparency"], 255, grey)
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


def read_image(path, size=None, fast=False):
    """An image file as uint8 [3, H, W], on white where transparent, of several frames the first; with `size`,
    ADM's centre crop. EXIF does not rotate it, as in ADM. fast: lets the JPEG decoder halve sides of four
    times `size` and more, which is not ADM's box filter (2 levels apart on average). Raises UserError for a
    file that cannot be decoded or has more pixels than Pillow's limit, as it is or enlarged to `size`."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, above {Image.MAX_IMAGE_PIXELS}")
            if fast and size is not None:
                image.draft("RGB", (2 * size, 2 * size))
            if image.mode.startswith(("I", "F")):                # Pillow's convert would clip them
                image = grey_to_8_bits(image)
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            if size is not None:
                image = center_crop(image, size)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except READ_ERRORS as e:
        raise UserError(f"{path}: cannot be read ({one_line(e)})") from None


# --- The data set, and the order of batches -----------------------------------------------------------------

TRIES = 20                                  # files that an item tries before it takes the disk for gone


class ImageFolder(Dataset):
    """The images of `list_classes`. Asked for as (index, flip), an item is (uint8 image [3, R, R], label, ''
    or what is wrong with an unreadable file, in whose place another one comes, of TRIES evenly spaced ones).
    Once `cached` is the folder of `cache_latents`, moments [2C, h, w] follow and, unless `with_images`, the
    image is empty. Raises UserError where none of TRIES files is readable."""
    cached, with_images = None, True

    def __init__(self, folder, resolution):
        classes = list_classes(folder)
        self.folder, self.resolution, self.classes = str(folder), resolution, list(classes)
        self.files = np.array([os.fsencode(path) for paths in classes.values() for path in paths])
        self.labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in classes.values()])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, item):
        (index, flip), bad, n = item, "", len(self)
        tries = min(TRIES, n)
        for k in range(tries):
            i = (index + k * (n // tries)) % n
            path, image = os.fsdecode(self.files[i]), torch.empty(3, 0, 0)
            moments = [read_latents(self.cached, i)] if self.cached else []
            try:
                if self.cached and moments[0].isnan().any():
                    raise UserError(f"{path}: unreadable when the latents were cached; to read it again, "
                                    f"delete {chunk_file(self.cached, i // CHUNK)} and start again")
                if self.with_images:
                    image = read_image(path, self.resolution, fast=True)
                return image.flip(2) if flip else image, int(self.labels[i]), bad, *moments
            except UserError as e:
                bad = bad or str(e)
        raise UserError(f"{self.folder}: none of {tries} images tried is readable, the first one {bad}")


def step_batches(n, cfg, step, rank, world):
    """This process's batches from `step` on: the data is one endless stream of epochs, each shuffled by
    (seed, epoch); step s takes positions s*B to (s+1)*B of it."""
    shuffled, order, share = None, None, cfg.batch_size // world
    for step in range(step, cfg.max_train_steps):
        flips = np.random.default_rng((cfg.seed, step, 2)).random(cfg.batch_size) < 0.5 * cfg.flip
        batch = []
        for k in range(rank * share, (rank + 1) * share):
            epoch, place = divmod(step * cfg.batch_size + k, n)
            if epoch != shuffled:
                shuffled, order = epoch, np.random.default_rng((cfg.seed, epoch, 3)).permutation(n)
            batch.append((int(order[place]), bool(flips[k])))
        yield batch


def ignore_signals(worker):
    """Loader processes outlive a signal to stop that goes to the group: the main process ends them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_loaders():
    """End all loader processes, however the main one ends."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)                 # PyTorch would report it as an accident
    for worker in multiprocessing.active_children():
        worker.kill()


def check_temporary_folder():
    """Raises UserError where loader processes cannot open a socket in the temporary folder (its path is too
    long for one, 108 bytes on Linux): they would wait for ever."""
    try:
        Listener().close()                              # at a path that multiprocessing chooses, as theirs
    except OSError as e:
        raise UserError(f"TMPDIR {tempfile.gettempdir()}: loader processes cannot open a socket in it ({e}); "
                        "set TMPDIR to a short path such as /tmp, or --num-workers 0") from None


def load_batches(dataset, batches, num_workers, pin_memory=False):
    """The collated `batches` (lists of items), read in processes that stay. A UserError of a loader process
    is raised here without the traceback that PyTorch writes before its line."""
    if num_workers > 0:
        check_temporary_folder()
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, pin_memory=pin_memory,
                        persistent_workers=num_workers > 0, worker_init_fn=ignore_signals)
    try:
        yield from loader
    except UserError as e:
        raise UserError(str(e).split(f"{UserError.__module__}.UserError: ")[-1].strip()) from None


def report_unreadable(lines, known, n):
    """Print each line about an unreadable image once; known: the set of those printed, of n images. Raises
    UserError above 1%."""
    for line in set(filter(None, lines)) - known:
        tqdm.write(f"skipped an unreadable image: {line}")
        known.add(line)
        if len(known) > 0.01 * n:
            raise UserError(f"{len(known)} of {n} images unreadable, the last one {line}")


# --- Cached latents -----------------------------------------------------------------------------------------

CHUNK = 1024                                                          # images a file of cached latents holds


def chunk_file(folder, k):
    return Path(folder) / f"{k:06d}.pt"


def read_latents(folder, i):
    """The moments [2C, h, w] of image i from its file of `cache_latents`. Raises UserError."""
    file = chunk_file(folder, i // CHUNK)
    try:
        return torch.load(file, mmap=True, weights_only=True)[i % CHUNK].clone()
    except (*READ_ERRORS, pickle.UnpicklingError) as e:
        raise UserError(f"{file}: these latents cannot be read ({one_line(e)}); delete the file, the next "
                        "start writes it again") from None


def latents_folder(output_dir, digest, dataset):
    """Where the latents of these images lie. Its name is a hash of what `digest` took (the VAE, its settings)
    and of the images' names, sizes and times of change: other latents, another folder."""
    for path in dataset.files:
        stat = os.stat(path)                                 # nobody can set a time of change back
        digest.update(path + f" {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} ".encode())
    return str(Path(output_dir) / f"latents-{digest.hexdigest()[:16]}")


def write_latents(dataset, folder, numbers, encode, num_workers, show):
    """Write these files of `cache_latents`, each whole or not at all; one set of loader processes for all."""
    batches = {}                                                           # of each file: lists of items
    for k in numbers:
        items = [(i, False) for i in range(k * CHUNK, min((k + 1) * CHUNK, len(dataset)))]
        batches[k] = [items[i:i + 32] for i in range(0, len(items), 32)]
    loader = iter(load_batches(dataset, [batch for k in numbers for batch in batches[k]], num_workers))
    known = set()
    for k in tqdm(numbers, "caching latents", disable=not show):
        rows = []
        for _ in batches[k]:
            images, _, bad = next(loader)
            report_unreadable(bad, known, len(dataset))
            rows.append(encode(images).half().cpu())
            rows[-1][torch.tensor([line != "" for line in bad])] = math.nan
        write_atomic(chunk_file(folder, k), lambda tmp: torch.save(torch.cat(rows), tmp))


def cache_latents(dataset, folder, encode, num_workers, processes):
    """Write the posterior's moments of all images once, float16 [1024, 2C, h, w] a file (NaN: an unreadable
    image), the work split over the processes. encode: images, uint8 [B, 3, R, R] -> moments [B, 2C, h, w].
    What an earlier run has written stays, unless it is damaged: all of it is read and compared with its
    checksums."""
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    files = math.ceil(len(dataset) / CHUNK)
    everywhere = range(processes.rank, files, processes.world)
    on_this_machine = range(local_rank, files, local_world)      # others' as well, where disks are not shared
    show, whole = processes.rank == 0, set()
    for mine in (everywhere, on_this_machine):
        there = [k for k in mine if k not in whole and chunk_file(folder, k).is_file()]
        bar = tqdm(there, "checking latents", delay=2, disable=not show)
        damaged = [k for k in bar if not is_whole_archive(chunk_file(folder, k))]
        if damaged:
            names = ", ".join(chunk_file(folder, k).name for k in damaged[:5])
            tqdm.write(f"{folder}: {len(damaged)} damaged files, written again: {names}"
                       f"{', ...' if len(damaged) > 5 else ''}")
        missing = [k for k in mine if k in damaged or not chunk_file(folder, k).is_file()]
        if missing:
            write_latents(dataset, folder, missing, encode, num_workers, show)
        whole.update(mine)
        processes.wait()
