"""files.py: atomic writes, the lock of a folder, and weights files read without running code in them."""
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
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from support.commands import UserError, one_line, require

try:
    import fcntl
except ImportError:                                                   # Windows: there is no lock
    fcntl = None


# --- Writing ------------------------------------------------------------------------------------------------

def if_supported(call, *args):
    """call(*args); does nothing where the file system lacks this call (CIFS and ZFS lack some)."""
    try:
        call(*args)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def open_special(path):
    """A pipe, a device, or what stdout or stderr is redirected to, open for writing; None for other files."""
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
    """Write a file atomically: write(path of a temporary file), sync, rename. Creates its folder. Replaces
    the target of a link, not the link; writes into a pipe or a device. Raises UserError."""
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


@contextmanager
def lock(folder):
    """Hold the lock of a run's folder, released when the process ends in any way, and delete the temporary
    files of a killed run there. Raises UserError if another process holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)     # flock's would survive in the loaders
        except (BlockingIOError, PermissionError):
            raise UserError(f"{folder}: another run is writing to it; give another --exp-name") from None
        except OSError as e:
            tqdm.write(f"{folder}: this file system has no locks ({e.strerror}); start only one run in it")
        for kind in ("checkpoints", "images"):                        # sample.py may be writing beside them
            for unfinished in (folder / kind).glob(".*.[0-9]*.tmp"):
                unfinished.unlink()
        yield


# --- Reading ------------------------------------------------------------------------------------------------

# Of damaged files.
READ_ERRORS = (OSError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError,
               EOFError, SyntaxError, struct.error, zipfile.BadZipFile, zlib.error,
               Image.DecompressionBombError)
# Of downloads. The bases of HfHubHTTPError are OSError and the error of the hub's HTTP library, which differs
# between versions. RuntimeError: of hf_xet, and of timm for a model without weights.
HUB_ERRORS = (*HfHubHTTPError.__bases__, OSError, RuntimeError, HFValidationError, SafetensorError)


def is_whole_archive(path):
    """Whether a file of torch.save, a zip, is complete and agrees with its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except READ_ERRORS:
        return False


def load_tensors(path):
    """The dict in a file of torch.save or .safetensors, on the CPU. Only tensors, plain containers and
    argparse.Namespace (in released checkpoints) are unpickled. The file is mapped: tensors are read when they
    are used. Raises UserError."""
    path = Path(path)
    require(path.is_file(), f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:        # torch.save never compresses; a zip bomb does
                require(sum(member.file_size for member in archive.infolist()) <= path.stat().st_size,
                        f"{path}: a compressed archive, not a weights file")
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as e:
        code = re.search("GLOBAL|unsupported class|unrecognized function", str(e))
        reason = "it holds more than tensors, refused" if code else "damaged"
        raise UserError(f"{path}: not a readable weights file ({reason})") from None
    except (*READ_ERRORS, SafetensorError) as e:
        raise UserError(f"{path}: not a readable weights file ({one_line(e)})") from None
    require(isinstance(state, dict), f"{path}: no state dict in it, but a {type(state).__name__}")
    return state


def strip_wrappers(state):
    """A state dict without DDP's "module." and torch.compile's "_orig_mod." anywhere in its keys."""
    return {".".join(part for part in str(key).split(".") if part not in ("module", "_orig_mod")): value
            for key, value in state.items()}


def load_into(module, state, what):
    """load_state_dict; raises a UserError that names the first tensor that does not fit."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError) as e:                                     # TypeError: not a dict
        reason = str(e).splitlines()[:2][-1].strip()[:160]
        raise UserError(f"{what}: {reason}; is this a checkpoint of another model?") from None


def hash_tensors(module):
    """hashlib's SHA-256 of the values in a module's state dict, to be updated further or read."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest
