"""files.py: files written whole or not at all, and files of tensors read without running what is in them."""
import argparse
import errno
import hashlib
import os
import pickle
import re
import shutil
import stat
import struct
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from support.commands import UserError, one_line

try:
    import fcntl
except ImportError:                                                   # Windows: two runs are not told apart
    fcntl = None


# --- Writing ------------------------------------------------------------------------------------------------

def if_supported(call, *args):
    """call(*args), ignoring that the file system lacks this call, as CIFS and ZFS lack some."""
    try:
        call(*args)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def open_special(path):
    """A pipe, a device or what stdout or stderr goes to, open for writing; None for other files."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if stream and os.path.samestat(found, os.fstat(number)):
            stream.flush()
            return open(os.dup(number), "wb")             # opened again, a file is written from its start
    return None if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode) else open(path, "wb")


def write_atomic(path, write):
    """Write a file atomically, with its folder: write(path), sync, rename. The target of a link is replaced,
    not the link; a pipe or a device is written into. Raises UserError."""
    target = Path(os.path.realpath(path))
    tmp = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        special = open_special(path)
        if special:
            with special, tempfile.TemporaryDirectory() as folder:      # writers seek, a pipe does not
                write(Path(folder) / "file")
                with open(Path(folder) / "file", "rb") as f:
                    shutil.copyfileobj(f, special)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        with open(tmp, "rb+") as f:
            if_supported(os.fsync, f.fileno())
        os.replace(tmp, target)
    except (OSError, RuntimeError, SafetensorError) as e:     # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or one_line(e)}") from None
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def save_npz(file, **arrays):
    """np.savez, atomically."""
    def write(tmp):
        with open(tmp, "wb") as f:                           # given a name, np.savez would add .npz to it
            np.savez(f, **arrays)
    write_atomic(file, write)


def lock(folder, instead="--exp-name NAME names another"):
    """Refuse a folder that a living run writes to (the lock goes with the process, however it ends). Returns
    the lock's file, to be kept open. Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)          # flock's would live on in the loaders
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another run is writing to it; {instead}") from None
    except OSError as e:
        tqdm.write(f"{folder}: no locks on this file system ({e.strerror}); let no other run write to it")
    return file


# --- Reading ------------------------------------------------------------------------------------------------

READ_ERRORS = (OSError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError,
               EOFError, SyntaxError, struct.error, zipfile.BadZipFile, zlib.error,
               Image.DecompressionBombError)                                                # of damaged files
# Of downloads. The hub's HTTP library differs between versions: HfHubHTTPError's bases are its error and
# OSError. RuntimeError: of hf_xet, and timm's for a model without weights.
HUB_ERRORS = (*HfHubHTTPError.__bases__, OSError, RuntimeError, HFValidationError, SafetensorError)


def is_whole_archive(path):
    """Whether all of a file of torch.save, a zip, can be read and agrees with its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except READ_ERRORS:
        return False


def load_tensors(path):
    """The dict in a file of torch.save or .safetensors, on the CPU; nothing is unpickled but tensors, plain
    containers and the argparse.Namespace of released checkpoints. The tensors are mapped, so only those that
    are used are read. Raises UserError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:        # torch compresses nothing: a bomb is not its file
                if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                    raise UserError(f"{path}: a compressed archive, not a weights file")
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as e:
        code = re.search("GLOBAL|unsupported class|unrecognized function", str(e))
        reason = "it holds more than tensors, refused" if code else "damaged"
        raise UserError(f"{path}: not a readable weights file ({reason})") from None
    except (*READ_ERRORS, SafetensorError) as e:
        raise UserError(f"{path}: not a readable weights file ({one_line(e)})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: no state dict in it, but a {type(state).__name__}")
    return state


def strip_wrappers(state):
    """A state dict without DDP's "module." and torch.compile's "_orig_mod.", wherever in its keys."""
    return {".".join(part for part in str(key).split(".") if part not in ("module", "_orig_mod")): value
            for key, value in state.items()}


def load_into(module, state, what):
    """load_state_dict, where a mismatch is one line that names the first offending tensor."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError) as e:                                     # TypeError: it is not a dict
        reason = str(e).splitlines()[:2][-1].strip()[:160]
        raise UserError(f"{what}: {reason}; is this a checkpoint of another model?") from None


def hash_tensors(module):
    """SHA-256, still open, of the values in a module's state dict."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest
