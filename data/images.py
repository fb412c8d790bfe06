"""images.py: images as data: found, read, cropped, sorted into classes, put into batches.

Images are uint8 [3, H, W], in batches [B, 3, H, W].
"""
import argparse
import atexit
import json
import multiprocessing
import os
import pickle
import signal
import tempfile
import unicodedata
import warnings
from collections import Counter, defaultdict
from functools import lru_cache
from multiprocessing.connection import Listener
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.openmoji import render_openmoji
from support.commands import STOP_SIGNALS, UserError, existing_folder, one_line, require
from support.files import READ_ERRORS

warnings.filterwarnings("ignore", module="PIL")                 # Pillow's warnings, repeated in every process

# --- Files --------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
                  ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
PACKED = {".parquet", ".tar", ".tgz", ".zip"}                   # data sets in a few files, for data/unpack.py


def how_to_unpack(path, suffixes):
    """What to type where data comes in files of these suffixes, as the end of an error's line; else ''."""
    return f"; python data/unpack.py {path} DIR writes its images to DIR" if PACKED & set(suffixes) else ""


def image_folder(text):
    """argparse's type of a folder of images."""
    try:
        return existing_folder(text)
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(f"{e}{how_to_unpack(text, [Path(text).suffix.lower()])}") from None


def list_images(folder):
    """Every image file under `folder`, sorted. Links are followed, but no folder is read twice; hidden files
    and broken links are left out. Raises UserError where there are no images."""
    found, others, seen = [], Counter(), set()

    def scan(root):
        if os.path.realpath(root) in seen:
            return
        seen.add(os.path.realpath(root))
        try:
            entries = sorted(os.scandir(root), key=lambda entry: entry.name)
        except OSError as e:
            raise UserError(f"{root}: no such folder, or not readable ({e.strerror})") from None
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(".") or entry.is_symlink() and not os.path.exists(entry.path):
                continue
            if entry.is_dir():
                scan(entry.path)
            elif suffix in IMAGE_SUFFIXES and entry.is_file():
                found.append(Path(entry.path))
            else:
                others[suffix or "no suffix"] += 1

    scan(folder)
    if not found:
        kinds = ", ".join(f"{n} of {suffix}" for suffix, n in others.most_common(5))
        raise UserError(f"{folder}: no images in it, {kinds or 'it is empty'}{how_to_unpack(folder, others)}")
    return found


def nfc(name):
    """A name in Unicode's composed form (NFC); macOS may store a letter and its accent apart (NFD)."""
    return unicodedata.normalize("NFC", name)


def list_classes(folder):
    """{class name, in NFC: its image files, sorted}; the k-th class is label k. Where `folder` holds
    dataset.json (of EDM's and StyleGAN's tools), the classes are the numbers in its "labels", pairs of [file,
    number]; else they are its subfolders; a folder without any is one class. Raises UserError."""
    root, table, classes = Path(folder), Path(folder) / "dataset.json", defaultdict(list)
    files = list_images(root)
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
        except READ_ERRORS as e:
            raise UserError(f"{table}: not [file, number] of every image in labels: {one_line(e)}") from None
        return {str(label): classes[label] for label in sorted(classes)}
    for path in files:
        inside = path.parts[len(root.parts):]
        classes[nfc(inside[0]) if len(inside) > 1 else ""].append(path)
    loose = classes.pop("", [])
    if not classes:
        return {"all": loose}
    empty = {nfc(p.name) for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")} - set(classes)
    if empty:
        raise UserError(f"{root / min(empty)}: no images in this class folder; remove it")
    if loose:
        tqdm.write(f"warning: {folder}: {len(loose)} images outside of the class folders are left out")
    if {"train", "val"} <= set(classes):
        tqdm.write(f"warning: train and val in {folder} are taken for classes; is {folder}/train meant?")
    return dict(sorted(classes.items()))


# --- One image ----------------------------------------------------------------------------------------------

def center_crop(image, size):
    """ADM's crop: box-halve a PIL image while its sides are >= 2 * size, bicubic to size, crop the middle.
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
    """A grey PIL image of mode I, I;16 or F as mode L, its transparent value white. Integers have 16 bits;
    floats are in [0, 1], or in [0, 255] where they exceed 2. Raises ValueError for others."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})                     # TIFF's tags
    margin, white = 0, 65535
    if image.mode == "F":
        margin, white = 255, 1 if values.max() <= 2 else 255                           # resizing overshoots
    grey = values / (white / 255)
    if not (-margin <= grey.min() and grey.max() <= 255 + margin):                     # NaN is refused, too
        raise ValueError(f"grey values from {values.min():g} to {values.max():g}")
    if tags.get(262) == 0:                                                             # 0 stands for white
        grey = 255 - grey
    if "transparency" in image.info:
        grey = np.where(values == image.info["transparency"], 255, grey)
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


def read_image(path, size=None, fast=False):
    """An image file (of several frames the first) as uint8 [3, H, W], on white where it is transparent; with
    `size`, ADM's centre crop. EXIF does not rotate it, as in ADM. fast: the JPEG decoder may halve sides of
    four times `size` and more, which is not ADM's box filter (2 levels apart on average). Raises UserError
    for a file that cannot be decoded or has more pixels than Pillow's limit, as it is or enlarged."""
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

TRIES = 20                                    # files that an item tries before the disk counts as lost
CHUNK = 1024                                  # images per file of cached latents, written by data/latents.py
SHUFFLE = 3                                   # a stream of random numbers: default_rng((seed, epoch, stream))


def chunk_file(folder, k):
    return Path(folder) / f"{k:06d}.pt"


def read_latents(folder, i):
    """The moments [2C, h, w] of image i from its file of cached latents. Raises UserError."""
    file = chunk_file(folder, i // CHUNK)
    try:
        return torch.load(file, mmap=True, weights_only=True)[i % CHUNK].clone()
    except (*READ_ERRORS, pickle.UnpicklingError) as e:
        raise UserError(f"{file}: these latents cannot be read ({one_line(e)}); delete the file, the next "
                        "start writes it again") from None


class ImageFolder(Dataset):
    """The images of `list_classes`. An item is (uint8 image [3, R, R], label, error). The error is
    '' or says why the file is unreadable; the image is then the next readable one of about TRIES evenly
    spaced files. With `cached`, a folder that data/latents.py has written, a fourth value is the moments
    [2C, h, w], and the image is empty unless `with_images`. Raises UserError where none of the files is
    readable."""
    cached, with_images = None, True

    def __init__(self, folder, resolution):
        classes = list_classes(folder)
        self.folder, self.resolution, self.classes = str(folder), resolution, list(classes)
        self.files = np.array([os.fsencode(path) for paths in classes.values() for path in paths])
        self.labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in classes.values()])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        error, n = "", len(self)
        tries = range(index, index + n, max(1, n // TRIES))
        for k in tries:
            i = k % n
            path, image = os.fsdecode(self.files[i]), torch.empty(3, 0, 0)
            moments = [read_latents(self.cached, i)] if self.cached else []
            try:
                if self.cached and moments[0].isnan().any():
                    raise UserError(f"{path}: unreadable when the latents were cached; to read it again, "
                                    f"delete {chunk_file(self.cached, i // CHUNK)} and start again")
                if self.with_images:
                    image = read_image(path, self.resolution, fast=True)
                return image, int(self.labels[i]), error, *moments
            except UserError as e:
                error = error or str(e)
        raise UserError(f"{self.folder}: none of {len(tries)} images tried is readable, the first one "
                        f"{error}")

    def some(self, n):
        """(n images, uint8 [n, 3, R, R], labels [n]), all where there are fewer; always the same."""
        chosen = np.random.default_rng(0).permutation(len(self))[:n].tolist()
        items = [self[index] for index in chosen]
        return torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])


def open_data(cfg, processes):
    """The ImageFolder of a run, listed by process 0 and sent to the others. Without cfg.data_dir it is
    OpenMoji, rendered first where it is missing; cfg.data_dir and cfg.val_dir then name its folders."""
    if not cfg.data_dir:
        rendered = Path("data") / f"openmoji-{cfg.resolution}"
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not rendered.is_dir():
            render_openmoji(rendered, cfg.resolution)
        cfg.data_dir, cfg.val_dir = str(rendered / "train"), cfg.val_dir or str(rendered / "val")
    dataset = ImageFolder(cfg.data_dir, cfg.resolution) if processes.rank == 0 else None
    dataset = processes.from_first(dataset)
    processes.wait()                                         # until every machine has rendered its images
    return dataset


def held_out_images(cfg, dataset):
    """256 images of cfg.val_dir, else of the training data, uint8 [N, 3, R, R], and their labels [N] as the
    training data numbers its classes. Raises UserError for a class that it lacks, with cfg.eval_steps."""
    held_out = ImageFolder(cfg.val_dir, cfg.resolution) if cfg.val_dir else dataset
    pixels, y = held_out.some(256)
    if len(dataset.classes) == 1:
        y = torch.zeros_like(y)
    elif cfg.eval_steps > 0:
        unknown = set(held_out.classes) - set(dataset.classes)
        require(not unknown, f"--eval-steps: --val-dir {cfg.val_dir} has classes that the data lacks: "
                f"{', '.join(sorted(unknown)[:5])}; give one with its classes")
        y = torch.tensor([dataset.classes.index(name) for name in held_out.classes])[y]
    return pixels, y


def step_batches(n, cfg, start, rank, world):
    """This process's batches from step `start` on, lists of indices: the data is one endless stream of
    epochs, each shuffled by (seed, epoch); step s takes positions s*B to (s+1)*B of it."""
    local_size = cfg.batch_size // world

    @lru_cache(maxsize=1)
    def order(epoch):
        return np.random.default_rng((cfg.seed, epoch, SHUFFLE)).permutation(n)

    for step in range(start, cfg.max_train_steps):
        batch = []
        for k in range(rank * local_size, (rank + 1) * local_size):
            epoch, position = divmod(step * cfg.batch_size + k, n)
            batch.append(int(order(epoch)[position]))
        yield batch


def ignore_signals(worker):
    """A signal to stop goes to loader processes as well; they ignore it, the main process ends them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_loaders():
    """End all loader processes, however the main one ends: they ignore the signal by which Python would."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)                # PyTorch would report it as an accident
    for worker in multiprocessing.active_children():
        worker.kill()


def load_batches(dataset, batches, num_workers, pin_memory=False):
    """The collated `batches` (lists of items), read in processes that stay. A UserError of a loader process
    is raised here without the traceback that PyTorch writes before its line; so is one where loader processes
    cannot open a socket in TMPDIR (its path is too long for one, 108 bytes on Linux): they would hang."""
    if num_workers > 0:
        try:
            Listener().close()                          # at a path that multiprocessing chooses, as theirs
        except OSError as e:
            raise UserError(f"TMPDIR {tempfile.gettempdir()}: loader processes cannot open a socket in it "
                            f"({e}); set TMPDIR to a short path such as /tmp, or --num-workers 0") from None
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, pin_memory=pin_memory,
                        persistent_workers=num_workers > 0, worker_init_fn=ignore_signals)
    try:
        yield from loader
    except UserError as e:
        raise UserError(str(e).split(f"{UserError.__module__}.UserError: ")[-1].strip()) from None


def report_unreadable(errors, known, n):
    """Print each error about an unreadable image once; known: the set of those printed, of n images. Raises
    UserError above 1%."""
    for error in set(filter(None, errors)) - known:
        tqdm.write(f"skipped an unreadable image: {error}")
        known.add(error)
        if len(known) > 0.01 * n:
            raise UserError(f"{len(known)} of {n} images unreadable, the last one {error}")
