"""devices.py: the device a program runs on, and the processes that torchrun started."""
import os
import shutil
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.commands import UserError


def pick_device(name):
    """'auto' is the first of cuda, mps, cpu that is there; under torchrun, this process's own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; take cpu, cuda, cuda:N, mps or auto") from None
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: this PyTorch sees {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
    return device


def can_compile(device):
    """torch.compile needs a C++ compiler on CPU and a C compiler on CUDA."""
    names = ("CXX", "g++", "clang++") if device.type == "cpu" else ("CC", "gcc", "clang")
    return device.type != "mps" and any(shutil.which(os.environ.get(name, name)) for name in names)


# --- Processes ----------------------------------------------------------------------------------------------

TIMEOUT = timedelta(minutes=8)                                # before NCCL's own, which names no process


@dataclass
class Processes:
    """This process's place among those of torchrun: rank of `world`. host: their group over the network's
    CPUs (gloo), None for one process alone. All processes call each method, at the same place."""
    rank: int = 0
    world: int = 1
    host: dist.ProcessGroup = None

    def say(self, line):
        """Print a line once, above the progress bars."""
        if self.rank == 0:
            tqdm.write(line)

    def any(self, condition):
        """Whether the condition is true of any process, the same answer on all. One that does not come within
        TIMEOUT is named: a UserError."""
        if self.world == 1:
            return bool(condition)
        answer = torch.tensor(bool(condition), dtype=torch.uint8)
        try:
            dist.monitored_barrier(self.host, TIMEOUT, wait_all_ranks=True)
            dist.all_reduce(answer, dist.ReduceOp.MAX, group=self.host)
        except RuntimeError as e:
            raise UserError(f"the processes lost each other: {str(e).splitlines()[0]}") from None
        return bool(answer)

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


def start_processes(device, timeout=timedelta(minutes=10)):
    """The Processes of torchrun, after joining their group if there is one. timeout: how long a process may
    wait for data of another one (NCCL's own is 10 minutes). Raises UserError."""
    if os.environ.get("WORLD_SIZE", "1") == "1":          # a platform may set it for a process without group
        return Processes()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is above 1, but {', '.join(missing)} not set: start with torchrun")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    host = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
    return Processes(dist.get_rank(), dist.get_world_size(), host)


def end_processes(processes):
    """Leave the group."""
    if processes.world > 1:
        dist.destroy_process_group()
