"""profile_step.py: how fast a step is, what share of the device's peak that is, and where its time goes.

    python benchmarks/profile_step.py STEPS FLAGS            FLAGS are train.py's

Runs real steps of a training run, touches no run's folder, and prints the step's time and its share of the
rate of a large matrix product, then torch.profiler's table of three more steps with a row for each section of
the forward pass (its backward stands in autograd's own rows).
"""
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))                                 # the six modules are there
import train
import vae
from data import images, latents
from support import devices
from support.commands import Parser, positive_int, run_command


def flops_per_image(m, cfg, batch):
    """FLOPs of an eager step on one image (products and convolutions, forward and backward); batch: as the
    loader gives it, of one image. It is a real step: weights move. Counted in the forms that the VAE has
    elsewhere than on CUDA: the ones for CUDA compute the same in fewer FLOPs."""
    one = replace(cfg, batch_size=1, gradient_accumulation_steps=1, disc_start=0)
    plain, eager = patch.object(vae, "on_cuda", lambda x: False), torch.compiler.set_stance("force_eager")
    with plain, eager, FlopCounterMode(display=False) as counter:
        train.run_step(m, one, 0, batch, 0, 1)
    return counter.get_total_flops()


def seconds_per_step(step, numbers):
    """The mean over step(k) for these numbers k; only the ends wait for the device."""
    synchronize = torch.accelerator.synchronize if torch.accelerator.is_available() else torch.cpu.synchronize
    synchronize()
    start = time.perf_counter()
    for k in numbers:
        step(k)
    synchronize()
    return (time.perf_counter() - start) / len(numbers)


def peak_flops(device, precision):
    """FLOP/s of a large square matrix product, in bf16 or float32 ("no")."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * n ** 3 / min(seconds_per_step(lambda k: a @ a, range(1)) for _ in range(4))


def mark_sections(m):
    """Give each section of the forward pass a row of its own in the profiler's table."""
    sections = [("VAE encoder", m.vae, "encode"), ("VAE decoder", m.vae, "decode"), ("D", m.disc, "forward"),
                ("perceptual distance", m.perceptual, "forward"), ("SiT", m.sit, "forward"),
                ("SiT, alignment pass", m.sit, "forward_projections")]
    sections += [("target features", encoder, "forward") for encoder in m.encoders]
    for name, owner, method in sections:
        if hasattr(owner, method):
            setattr(owner, method, record_function(f"# {name}")(getattr(owner, method)))


def main():
    parser = Parser(description="Profile steps. Further flags are train.py's.", allow_abbrev=False)
    parser.add_argument("steps", type=positive_int, help="that are timed, after three that warm up")
    args, flags = parser.parse_known_args()
    cfg = train.parse_config([*flags, "--max-train-steps", str(args.steps + 8)])
    device = devices.pick_device(cfg.device)
    processes = devices.start_processes(device)
    cfg.mixed_precision = devices.choose_precision(cfg.mixed_precision, device, processes)
    cfg.compile = cfg.compile and devices.can_compile(device, processes)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dataset = images.open_data(cfg, processes)
    train.use_classes(cfg, dataset, processes.log)
    m = train.build(cfg, device)
    train.wrap(m, cfg, processes.world)
    mark_sections(m)                                                  # outside of what is compiled
    if cfg.cache_latents:
        latents.use_cached_latents(dataset, m.vae, m.device, cfg, processes)
        dataset.with_images = len(m.encoders) > 0
    torch.backends.cudnn.benchmark = True
    batches = train.load_run(m, cfg, dataset, 0, processes)
    one_image = [values[:1] for values in next(batches)]
    flops = flops_per_image(m, cfg, one_image) * cfg.batch_size // processes.world

    def step(k):
        train.run_step(m, cfg, k, next(batches), processes.rank, processes.world)

    seconds_per_step(step, range(3))
    seconds = seconds_per_step(step, range(3, 3 + args.steps))
    peak = peak_flops(device, cfg.mixed_precision)
    processes.log(f"step {seconds * 1e3:.1f} ms, {cfg.batch_size / seconds:.1f} images/s, "
                  f"GPU memory {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB\n"
                  f"{flops / 1e12:.4f} TFLOP per step and process: {flops / seconds / 1e12:.3f} TFLOP/s, "
                  f"{flops / seconds / peak:.1%} of a matrix product's {peak / 1e12:.3f}")
    os.environ["KINETO_LOG_LEVEL"] = "99"                             # silences the profiler's own log
    with torch.profiler.profile() as profiler:
        seconds_per_step(step, range(3 + args.steps, 6 + args.steps))    # more: too many to sort
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = profiler.key_averages()                       # sections (and AdamW, which PyTorch marks) first
    rows.sort(key=lambda row: ("#" not in row.key, -getattr(row, order)))
    processes.log(rows.table(row_limit=40, max_name_column_width=50))
    sys.stdout.flush()
    os._exit(0)                                                       # at once, loader processes included


if __name__ == "__main__":
    run_command(main)
