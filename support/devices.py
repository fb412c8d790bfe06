"""devices.py: the device, its precision, torch.compile, and the processes of torchrun."""
import os
import platform
import subprocess
import time
import timeit
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch._inductor.config
import torch.distributed as dist
from tqdm import tqdm

from support.commands import UserError, one_line, require

# --- The device ---------------------------------------------------------------------------------------------

def pick_device(name):
    """The torch.device of this name; "auto": the first of cuda, mps, cpu that is available. Under torchrun,
    "cuda" is this process's own GPU. Raises UserError."""
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if gpus else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; take cpu, cuda, cuda:N, mps or auto") from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    available = dict(cpu=True, mps=mps, cuda=device.type == "cuda" and device.index < gpus)
    require(available.get(device.type),
            f"--device {device}: not available ({gpus} CUDA devices); take cpu, cuda, cuda:N, mps or auto")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def is_x86():
    return platform.machine().lower() in ("x86_64", "amd64")


def memory_format(device):
    """Channels last for image tensors, except where it is slower: on x86 CPUs without AVX-512
    (docs/performance.md), and on MPS, where it has also given wrong gradients of batch norm (PyTorch issues
    193349, 175189)."""
    kind = torch.device(device).type
    old_cpu = kind == "cpu" and is_x86() and torch.backends.cpu.get_cpu_capability() != "AVX512"
    return torch.contiguous_format if old_cpu or kind == "mps" else torch.channels_last


def disable_wrong_attention(*tokens):
    """Work around a bug of cuDNN's attention, PyTorch's first choice on H100 and H200: NaN gradients for
    sequence lengths n with n % 128 == 64 where all logits of a row are below -88 (PyTorch issue 196678).
    tokens: the sequence lengths of this run."""
    if any(n % 128 == 64 for n in tokens):
        torch.backends.cuda.enable_cudnn_sdp(False)


def bf16_is_faster(device):
    """Whether bf16 is faster than float32; on a CPU, by timing a matrix product on one thread, in CPU time.
    Autocast would emulate missing instructions, slowly; and some CPUs that have them are slower than in
    float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":                                          # less memory, but no faster
        return False
    threads, seconds = torch.get_num_threads(), {}
    torch.set_num_threads(1)                                          # several would wait for a busy core
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        product = partial(torch.mm, a, a)
        seconds[dtype] = min(timeit.repeat(product, timer=time.thread_time, number=1, repeat=10))
    torch.set_num_threads(threads)
    return seconds[torch.bfloat16] < seconds[torch.float32]


def choose_precision(asked, device, processes):
    """--mixed-precision: "bf16" or "no"; "auto" is bf16 where it is faster on all processes. Prints what
    "auto" chose, or a warning where bf16 is slow."""
    if asked == "no":
        return "no"
    slow = processes.any(not bf16_is_faster(device))
    if asked == "auto":
        asked = "no" if slow else "bf16"
        processes.log("precision: float32 (bf16 is not faster here)" if slow else "precision: bf16")
    elif slow:
        processes.log("warning: bf16 is not faster here than --mixed-precision no")
    return asked


@contextmanager
def full_float32(device):
    """No autocast and no TF32 inside, for networks whose features are compared."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def why_no_compile(device):
    """Why torch.compile does not work, "" where it does: it compiles a small function."""
    if device.type == "mps":
        return "torch.compile is not used on MPS"
    try:
        with torch._inductor.config.patch(compile_threads=1):                # starts no pool of compilers
            torch.compile(torch.sin)(torch.ones(8, device=device))
    except (RuntimeError, OSError, subprocess.SubprocessError) as e:         # of a compiler or Triton
        return f"torch.compile: {one_line(e)}"
    return ""


def can_compile(device, processes):
    """Whether torch.compile works on all processes. Prints why not."""
    reason = why_no_compile(device)
    if processes.any(reason):
        processes.log(f"{reason or 'torch.compile: not on another machine'}; running eagerly (--no-compile)")
        return False
    return True


def cores():
    """CPU cores for each process on this machine."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, mine // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# --- Processes ----------------------------------------------------------------------------------------------

TIMEOUT = timedelta(hours=1)                  # of collectives of devices: loading and compiling times differ
HOST_TIMEOUT = timedelta(hours=12)            # of those of hosts: process 0 saves and samples alone


@dataclass
class Processes:
    """The processes of torchrun: this one's rank among `world`. host: the gloo group for collectives of the
    hosts; None for a single process. All processes call its methods at the same places."""
    rank: int = 0
    world: int = 1
    host: dist.ProcessGroup = None

    def log(self, line):
        """Print a line once, above the progress bars."""
        if self.rank == 0:
            tqdm.write(line)

    def any(self, condition):
        """Whether the condition is true on any process; waits for slow ones."""
        if self.world == 1:
            return bool(condition)
        answer = torch.tensor(float(bool(condition)))
        dist.all_reduce(answer, dist.ReduceOp.MAX, group=self.host)
        return bool(answer)

    def wait(self):
        """Wait for all other processes, hours if necessary."""
        if self.world > 1:
            dist.barrier(self.host)

    def from_first(self, value):
        """Process 0's value (anything that pickles), on all processes; the others' own is ignored."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.host)
        return values[0]

    def gather(self, value):
        """The values (anything that pickles) of all processes by rank on process 0, [] on the others."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, values, group=self.host)
        return values or []


def start_processes(device):
    """Join torchrun's group, if there is one; returns the Processes. Raises UserError."""
    if os.environ.get("WORLD_SIZE", "1") == "1":          # some platforms set it without a group
        return Processes()
    missing = ", ".join(name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ)
    require(not missing, f"WORLD_SIZE is above 1, but {missing} not set: start with torchrun")
    nccl = device.type == "cuda" and dist.is_nccl_available()                        # Windows has none
    dist.init_process_group("nccl" if nccl else "gloo", timeout=TIMEOUT, device_id=device if nccl else None)
    host = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    return Processes(dist.get_rank(), dist.get_world_size(), host)


def end_processes(processes):
    """Leave the group of start_processes."""
    if processes.world > 1:
        dist.destroy_process_group()
