"""measure.py: how fast training steps, sampling and the VAE's layers are, with random weights and offline.

    bash benchmarks/gpu.sh                                  all of it, and the tables
    python benchmarks/measure.py steps FILE FLAGS           steps of 4, 8, 16, ... images, until out of memory
    python benchmarks/measure.py release FILE FLAGS         a step of the authors' code in --release DIR
    python benchmarks/measure.py sampling FILE FLAGS        images/s, without and with guidance
    python benchmarks/measure.py parts FILE FLAGS           layers of the VAE, each alone, in several forms
    python benchmarks/measure.py tables FILE                all of FILE as markdown

FLAGS are train.py's (files that they name are not read) and those below. Each measurement is a line of JSON
at the end of FILE.
"""
import gc
import json
import re
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import compile_times

sys.path.insert(0, str(Path(__file__).parents[1]))                                 # the six modules are there
import train
import vae
from benchmarks.memory import random_batch, read_flags
from benchmarks.parts import parts
from benchmarks.profile_step import flops_per_image, peak_flops, seconds_per_step
from benchmarks.release import release_step
from sample import Sampler, choose_labels, sample_images
from support.commands import Parser, oom_message, positive_int, require, run_command
from support.devices import Processes, can_compile, choose_precision, pick_device
from support.metrics import read_rows

# Kinds of kernels by words in their names; the first that fits counts. Copies: to other layouts, precisions.
KERNELS = dict(copies_ms="nchwTo|nhwcTo|AddPadding|copy_kernel|Transpose", attention_ms="flash|fmha|sdpa",
               triton_ms="triton_", convolutions_ms="conv|fprop|dgrad|wgrad",
               products_ms="gemm|addmm|bmm|nvjet|cutlass|splitK", optimizers_ms="multi_tensor|adam")


def measure_step(step, steps):
    """Time and memory of step(k): of the first, then the mean of so many steps after two more; then the
    milliseconds per kind of kernel in two more (without CUDA: of operation). Prints the slowest kernels."""
    row, activity, time_name = {}, torch.profiler.ProfilerActivity.CPU, "self_cpu_time_total"
    row["first_step_s"] = seconds_per_step(step, range(1))
    seconds_per_step(step, range(1, 3))
    if torch.cuda.is_available():
        activity, time_name = torch.profiler.ProfilerActivity.CUDA, "self_device_time_total"
        torch.cuda.reset_peak_memory_stats()                        # cuDNN's trials in the first took more
    row["step_ms"] = 1e3 * seconds_per_step(step, range(3, 3 + steps))
    row["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
    with torch.profiler.profile(activities=[activity]) as profiler:
        seconds_per_step(step, range(2))
    kernels = profiler.key_averages()
    for kernel in kernels:
        kind = next((kind for kind, words in KERNELS.items() if re.search(words, kernel.key)), "other_ms")
        row[kind] = row.get(kind, 0) + getattr(kernel, time_name) / 2e3
    print(kernels.table(sort_by=time_name, row_limit=100, max_name_column_width=100))
    return row


def steps(args, cfg, m):
    """A step of args.images images, twice as many, ..., until out of memory or args.most; with --compile then
    the same compiled, beginning with the most that fit: compiling for each would take long."""
    peak, fits = peak_flops(m.device, cfg.mixed_precision), args.images
    flops = flops_per_image(m, cfg, random_batch(m, cfg, 1))
    train.wrap(m, cfg, 1)

    def step(k):
        train.run_step(m, cfg, k, batch, 0, 1)

    for compiled in (False, True) if cfg.compile else (False,):
        cfg.batch_size = fits
        while cfg.batch_size <= args.most:
            torch.compiler.reset()                          # or the second size would compile for any size
            gc.collect()
            torch.cuda.empty_cache()
            row = dict(images=cfg.batch_size, compiled=compiled)
            try:
                with m.device:
                    batch = random_batch(m, cfg, cfg.batch_size)
                with torch.compiler.set_stance("default" if compiled else "force_eager"):
                    row |= measure_step(step, args.steps)
            except (RuntimeError, MemoryError) as e:
                row["ended"] = oom_message(e, "fewer images at once")
                if not row["ended"]:
                    raise
                yield row
                break
            per_second = 1e3 * cfg.batch_size / row["step_ms"]
            yield row | dict(images_per_second=per_second, share_of_peak=per_second * flops / peak,
                             peak_tflops=peak / 1e12)
            fits = cfg.batch_size
            cfg.batch_size *= 2


def release(args, cfg, m):
    """A step of the authors' code, of args.images images."""
    cfg.mixed_precision = "fp16" if m.device.type == "cuda" else "no"                   # theirs; not on a CPU
    step = release_step(args.release, cfg, m)
    del m                                                           # its memory does not count
    gc.collect()
    yield dict(images=args.images, precision=cfg.mixed_precision) | measure_step(step, args.steps)


def sampling(args, cfg, m):
    """Images/s of sample.py without its files: args.images at a time, args.steps Euler steps."""
    require(not cfg.vae_only, "--vae-only: there is no SiT to sample with")
    sampler = Sampler(m.ema, m.vae, vars(cfg), 0, m.device)
    labels = choose_labels(args.images, range(m.ema.num_classes))
    if cfg.compile:
        m.ema.compile_blocks()
        m.vae.decoder.compile()
    for scale in (1.0, 2.0):
        torch.compiler.reset()

        def generate(k, scale=scale):
            sample_images(sampler, range(args.images), labels, num_steps=args.steps, cfg_scale=scale,
                          mixed_precision=cfg.mixed_precision)

        seconds_per_step(generate, range(1))                                          # a warm-up
        yield dict(images=args.images, sampler_steps=args.steps, cfg_scale=scale,
                   images_per_second=args.images / seconds_per_step(generate, range(1)))


def print_tables(rows):
    """All rows, in a table for each kind of measurement."""
    for measured in dict.fromkeys(row["measured"] for row in rows):
        chosen = [row for row in rows if row["measured"] == measured]
        titles = dict.fromkeys(name for row in chosen for name in row)
        print("\n| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
        for row in chosen:
            values = [row.get(title, "") for title in titles]
            print("|", *(f"{x:.4g} |" if isinstance(x, float) else f"{x} |" for x in values))


def main():
    parser = Parser(description="Measure this device. Further flags are train.py's.", allow_abbrev=False)
    measures = dict(steps=steps, release=release, sampling=sampling, parts=parts)
    parser.add_argument("what", choices=[*measures, "tables"])
    parser.add_argument("file", metavar="FILE", help="gets a line of JSON per measurement")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--images", type=positive_int, default=4, help="at once; steps: to begin with (4)")
    parser.add_argument("--most", type=positive_int, default=256, help="images per step (256)")
    parser.add_argument("--steps", type=positive_int, default=10,
                        help="timed steps, or the sampler's steps (10)")
    parser.add_argument("--release", metavar="DIR", help="with models/ and loss/ of the authors' code")
    parser.add_argument("--variant", default="", choices=["plain", "plans", "autotune"],
                        help="plain: without the VAE's forms for CUDA; plans: cuDNN tries all of its plans; "
                        "autotune: torch.compile tries more kernels")
    args, flags = parser.parse_known_args()
    if args.what == "tables":
        rows = read_rows(Path(args.file))
        require(rows, f"{args.file}: no measurements in it; bash benchmarks/gpu.sh makes them")
        print_tables(rows)
        return
    device = pick_device("auto")
    card = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        card = torch.cuda.get_device_name()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True            # as train.py
    torch.backends.cudnn.benchmark = True
    if args.variant == "plain":
        vae.on_cuda = lambda x: False
    if args.variant == "plans":
        torch.backends.cudnn.benchmark_limit = 0
    torch._inductor.config.max_autotune = args.variant == "autotune"
    precision = choose_precision("auto", device, Processes())
    cfg = read_flags(["--mixed-precision", precision, "--batch-size", str(args.images), *flags], 1)
    cfg.compile = args.compile and can_compile(device, Processes())
    settings = dict(device=card, torch=torch.__version__, measured=args.what, flags=" ".join(flags),
                    compiled=cfg.compile, precision=precision, variant=args.variant)
    for row in measures[args.what](args, cfg, train.build(cfg, device)):
        line = json.dumps(settings | row)
        print(line)
        with open(args.file, "a") as f:
            f.write(line + "\n")
    print(compile_times())


if __name__ == "__main__":
    run_command(main, less_memory="smaller sizes, by the variables of gpu.sh")
