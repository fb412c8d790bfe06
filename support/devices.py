"""devices.py: what a program runs on: the device, its precision, a compiler, the processes of torchrun."""
import os
import platform
import shutil
import sysconfig
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._triton import has_triton
from tqdm import tqdm

from support.commands import UserError, one_line


# --- The device ---------------------------------------------------------------------------------------------

def pick_device(name):
    """'auto' is the first of cuda, mps, cpu that is there; under torchrun, this process's own GPU. Raises
    UserError for one that is not there, and for a GPU that this PyTorch has no kernels for."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; take cpu, cuda, cuda:N, mps or auto") from None
    here = dict(cpu=True, cuda=True, mps=torch.backends.mps.is_available())                # cuda: see below
    if not here.get(device.type):
        raise UserError(f"--device {name}: not here; take cpu, cuda, cuda:N, mps or auto")
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: this PyTorch sees {torch.cuda.device_count()} CUDA devices")
        if not has_kernels(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()):
            kinds = ", ".join(torch.cuda.get_arch_list())
            raise UserError(f"--device {device}: {torch.cuda.get_device_name(device)} is none of {kinds}, "
                            "which this PyTorch is built for; install another build, or take --device cpu")
        torch.cuda.set_device(device)
    return device


def has_kernels(capability, built_for):
    """Whether a build of PyTorch runs on a GPU of this compute capability, (major, minor). built_for: names
    like sm_86 (kernels, which run on later minor versions of the same major) and compute_90 (code compiled on
    the way, for all that are later). Other names are another maker's: not judged."""
    major, minor = capability
    for name in built_for:
        kind, _, number = name.partition("_")
        number = number.rstrip("af")                                  # sm_90a: for that one alone
        if kind not in ("sm", "compute") or not number.isdecimal():
            return True
        built = int(number[:-1]), int(number[-1])
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return not built_for


def memory_format(device):
    """The order of image tensors in memory: channels last, but not on MPS, where PyTorch has had wrong
    gradients of batch norm (its issue 175189) and very slow ones of convolutions (193349) with it."""
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def avoid_wrong_attention(*positions):
    """Turn cuDNN's attention off, which PyTorch prefers on H100 and H200, where it runs over one of these
    numbers of positions: its backward pass has given NaN for those that leave half of a tile of 128 empty,
    once all logits of a row are below -88 (PyTorch's issue 196678). Another kernel takes over."""
    if any(n % 128 == 64 for n in positions):
        torch.backends.cuda.enable_cudnn_sdp(False)


def computes_bf16(device):
    """Whether the hardware has bf16 arithmetic. PyTorch's autocast does not ask: it emulates, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        # On x86 oneDNN says yes to AVX-512 alone, and then takes three times as long as in float32.
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        instructions = torch.cpu._is_avx512_bf16_supported() if x86 else True
        return bool(instructions and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False                                                      # MPS: it saves memory, but no time


def choose_precision(asked, device, processes):
    """--mixed-precision: 'bf16' or 'no' as asked, for 'auto' by what the hardware of all processes computes.
    What 'auto' has chosen, or that what was asked for is slow here, is said in one line."""
    if asked == "no":
        return asked
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    emulated = processes.any(not computes_bf16(device))
    why = "on MPS bf16 saves memory, no time" if device.type == "mps" else f"this {kind} only emulates bf16"
    if asked == "auto" and emulated:
        processes.say(f"precision: float32 ({why})")
    elif asked == "auto":
        processes.say(f"precision: bf16 (this {kind} computes it)")
    elif emulated:
        processes.say(f"warning: {why}; --mixed-precision no is as fast or faster")
    return "no" if asked == "auto" and emulated else "bf16"


@contextmanager
def full_float32(device):
    """No autocast and no TF32 in the calls within, for networks whose features are compared."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value


def why_no_compile(device):
    """What torch.compile lacks here, in words; '' where it lacks nothing."""
    if device.type == "mps":
        return "torch.compile is not used on MPS"
    language, variable, names = "C", "CC", ["gcc", "clang", "cl"]
    if device.type == "cpu":
        language, variable, names = "C++", "CXX", ["g++", "clang++", "cl"]
    if not any(shutil.which(name) for name in [os.environ.get(variable, ""), *names]):
        return f"no {language} compiler here"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "no Python.h here (Debian's package is python3-dev)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs a GPU of compute capability 7.0 or more"
    if device.type == "cuda" and not has_triton():
        return "no Triton here"
    return ""


def cores():
    """CPU cores for each process on this machine."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, mine // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# --- Processes ----------------------------------------------------------------------------------------------

TIMEOUT = timedelta(hours=1)                  # of what the devices exchange: loading and compiling may differ
HOST_TIMEOUT = timedelta(hours=12)            # of what the hosts do: process 0 saves, or samples, alone


@dataclass
class Processes:
    """This process's place among those of torchrun: rank of `world`. host: their group over the network's
    CPUs (gloo), None for one process alone. All call `any`, `wait` and `from_first` at the same place."""
    rank: int = 0
    world: int = 1
    host: dist.ProcessGroup = None

    def say(self, line):
        """Print a line once, above the progress bars."""
        if self.rank == 0:
            tqdm.write(line)

    def any(self, condition):
        """Whether the condition is true of any process, the same answer on all, however long one takes. Where
        processes have ended: a UserError that names them, at once."""
        if self.world == 1:
            return bool(condition)
        answer = torch.tensor(bool(condition), dtype=torch.uint8)
        try:
            dist.all_reduce(answer, dist.ReduceOp.MAX, group=self.host)
        except RuntimeError as e:
            ended = [str(rank) for rank in range(self.world) if rank != self.rank and self.ended(rank)]
            reason = f"rank {', '.join(ended)} ended, see its own output" if ended else one_line(e)
            raise UserError(f"the processes lost each other: {reason}") from None
        return bool(answer)

    def ended(self, rank):
        """Whether the connection to a process is closed."""
        try:
            dist.isend(torch.zeros(1), rank, group=self.host)
        except RuntimeError:
            return True
        return False

    def wait(self):
        """For all the others, hours if need be."""
        if self.world > 1:
            dist.barrier(self.host)

    def from_first(self, value):
        """Process 0's value (anything that pickles), on all; the others' own is not looked at."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.host)
        return values[0]


def start_processes(device):
    """The Processes of torchrun, after joining their group if there is one. Raises UserError."""
    if os.environ.get("WORLD_SIZE", "1") == "1":          # a platform may set it for a process without group
        return Processes()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is above 1, but {', '.join(missing)} not set: start with torchrun")
    on_gpus = device.type == "cuda" and dist.is_nccl_available()                     # Windows has none
    dist.init_process_group("nccl" if on_gpus else "gloo", timeout=TIMEOUT,
                            device_id=device if on_gpus else None)
    host = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    return Processes(dist.get_rank(), dist.get_world_size(), host)


def end_processes(processes):
    """Leave the group."""
    if processes.world > 1:
        dist.destroy_process_group()
