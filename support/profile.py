"""profile.py: how fast a step is, what share of the device's peak that is, and where its time goes."""
import os
import time
import timeit

import torch
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode


def count_flops(step):
    """FLOPs of step(), forward and backward: products and convolutions, uncompiled."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_flops(device, dtype):
    """FLOP/s of a large square matrix product."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = min(timeit.repeat(lambda: (a @ a)[0, 0].item(), repeat=4, number=1))       # item() waits for it
    return 2 * n ** 3 / seconds


def mark_sections(sections):
    """Give each (name, module, its method) a row of its own in the profiler's table."""
    for name, owner, method in sections:
        setattr(owner, method, record_function(f"# {name}")(getattr(owner, method)))


def profile(run_step, steps, images, flops, peak, device, say):
    """The rate of `steps` steps after three of warm-up; then torch.profiler's table of three more, with a row
    for each section of the forward pass (its backward stands in autograd's own rows). run_step(k): the k-th
    step, of so many images over all processes and FLOPs in this one; peak: FLOP/s; say(line) prints."""
    def seconds_a_step(first, steps):
        start = time.perf_counter()
        for k in range(first, first + steps):
            run_step(k)
        getattr(torch, device.type).synchronize()
        return (time.perf_counter() - start) / steps

    seconds_a_step(0, 3)
    seconds = seconds_a_step(3, steps)
    memory = ""
    if device.type == "cuda":
        memory = f", GPU memory {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB"
    say(f"step {seconds * 1e3:.1f} ms, {images / seconds:.1f} images/s{memory}\n"
        f"{flops / 1e12:.4f} TFLOP a step and process: {flops / seconds / 1e12:.3f} TFLOP/s, "
        f"{flops / seconds / peak:.1%} of a matrix product's {peak / 1e12:.3f}")
    os.environ["KINETO_LOG_LEVEL"] = "99"                             # the profiler's own notes stay unsaid
    with torch.profiler.profile() as profiler:
        seconds_a_step(3 + steps, 3)                                  # a GPU's events are many to sort
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = profiler.key_averages()                       # sections (and AdamW, which PyTorch marks) first
    rows.sort(key=lambda row: ("#" not in row.key, -getattr(row, order)))
    say(rows.table(row_limit=40, max_name_column_width=50))
