"""measure.py: how long training steps and sampling take here, with random weights and offline.

    bash benchmarks/gpu.sh                                  all of it, and the table
    python benchmarks/measure.py steps FILE FLAGS           steps of 4, 8, 16, ... images, until out of memory
    python benchmarks/measure.py sampling FILE FLAGS        images/s, without and with guidance
    python benchmarks/measure.py table FILE                 all of FILE as markdown

FLAGS are train.py's (files that they name are not read) and --compile. Each measurement is a line of JSON at
the end of FILE. `steps` does not measure again what is in FILE: it may be stopped at any time.
"""
import gc
import json
import sys
import time
from itertools import repeat
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))                                 # the six modules are there
import train
from benchmarks.memory import random_batch, read_flags
from benchmarks.profile_step import flops_per_image, peak_flops, seconds_per_step
from sample import Sampler, sample_images
from support.commands import Parser, oom_message, positive_int, require, run_command
from support.devices import Processes, choose_precision, pick_device, why_no_compile
from support.metrics import read_rows


def write_row(file, device, row):
    """Append a measurement: a dict of plain values."""
    card = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
    line = json.dumps(dict(device=card, torch=torch.__version__) | row)
    print(line, flush=True)
    with open(file, "a") as f:
        f.write(line + "\n")


def steps(args, cfg, device, settings):
    """Time and memory of a step of args.images images, twice as many, ..., until out of memory or args.most.
    Compiled, it begins with the most that fit eagerly: compiling for each would take long."""
    rows = [row for row in read_rows(Path(args.file)) if row.get("measured") == "steps"
            and row["flags"] == settings["flags"]]
    fits = {(row["images"], row["compiled"]): "step" in row for row in rows}
    images = args.images
    if cfg.compile:
        images = max([images, *(n for (n, compiled), fit in fits.items() if fit and not compiled)])
    peak = peak_flops(device, cfg.mixed_precision)
    m = train.build(cfg, device)
    flops = flops_per_image(m, cfg, random_batch(m, cfg, 1))
    train.wrap(m, cfg, 1)
    torch.backends.cudnn.benchmark = True
    while images <= args.most and fits.get((images, cfg.compile), True):
        if (images, cfg.compile) not in fits:
            torch.compiler.reset()                          # or the second size would compile for any size
            gc.collect()
            torch.cuda.empty_cache()
            cfg.batch_size = images
            row = settings | dict(images=images, steps=args.steps, tflop=flops * images / 1e12,
                                  peak_tflops=peak / 1e12)
            try:
                batch = random_batch(m, cfg, images)
                if device.type == "cuda":                                                   # as the loader's
                    batch = [x.pin_memory() if isinstance(x, torch.Tensor) else x for x in batch]
                row["first_step"] = seconds_per_step(m, cfg, repeat(batch), 0, 1)
                seconds_per_step(m, cfg, repeat(batch), 1, 2)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)      # cuDNN's trials in the first took more
                row["step"] = seconds_per_step(m, cfg, repeat(batch), 3, args.steps)
            except (RuntimeError, MemoryError) as e:
                row["ended"] = oom_message(e, "fewer images at once")
                if not row["ended"]:
                    raise
                write_row(args.file, device, row)
                return
            row["images_per_second"] = images / row["step"]
            row["share_of_peak"] = flops * images / row["step"] / peak
            if device.type == "cuda":
                row["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2 ** 30
            write_row(args.file, device, row)
        images *= 2


def sampling(args, cfg, device, settings):
    """Images/s of sample.py without its files: args.images at a time, args.steps Euler steps."""
    require(not cfg.vae_only, "--vae-only: there is no SiT to sample with")
    m = train.build(cfg, device)
    sampler = Sampler(m.ema, m.vae, vars(cfg), 0, device)
    if cfg.compile:
        m.ema.compile_blocks()
        m.vae.decoder.compile()
    for scale in (1.0, 2.0):
        torch.compiler.reset()
        for _ in range(2):                                                          # the first is a warm-up
            start = time.perf_counter()
            sample_images(sampler, range(args.images), num_steps=args.steps, cfg_scale=scale,
                          mixed_precision=cfg.mixed_precision)
            getattr(torch, device.type).synchronize()
            seconds = time.perf_counter() - start
        row = dict(images=args.images, num_steps=args.steps, cfg_scale=scale)
        write_row(args.file, device, settings | row | dict(images_per_second=args.images / seconds))


# --- The table ----------------------------------------------------------------------------------------------

def table_cells(row):
    """{title: cell} of a measurement, or of a section of gpu.sh."""
    if "part" in row:
        return dict(section=row["part"], outcome=row["outcome"], seconds=row["seconds"])
    mode = "compiled" if row["compiled"] else "eager"
    if row["measured"] == "sampling":
        what = f"{row['model']}, {row['num_steps']} Euler steps, {row['images']} at a time"
        return {"samples of": what, "guidance": row["cfg_scale"], "mode": mode,
                "images/s": f"{row['images_per_second']:.2f}"}
    stage = "second stage" if row["vae_grad"] == "none" else "REPA-E"
    cells = {"step of": f"{row['model']}, {stage}", "images": row["images"], "mode": mode}
    if "step" not in row:
        return cells | {"first step, s": "out of memory"}
    return cells | {"first step, s": f"{row['first_step']:.1f}", "ms": f"{row['step'] * 1e3:.1f}",
                    "images/s": f"{row['images_per_second']:.1f}",
                    "of the peak": f"{row['share_of_peak']:.0%} of {row['peak_tflops']:.4g} TFLOP/s",
                    "GiB": f"{row['memory_gib']:.1f}" if "memory_gib" in row else ""}


def print_table(rows):
    """All tables, a row per measurement. The last of several measurements of the same counts."""
    print(f"{rows[-1]['device']}, PyTorch {rows[-1]['torch']}")
    tables = {}
    for row in sorted(rows, key=lambda row: "part" in row):                      # gpu.sh's sections last
        cells = table_cells(row)
        measured = tuple(cells.values())[:1 if "part" in row else 3]
        tables.setdefault(next(iter(cells)), {})[measured] = cells
    for table in tables.values():
        titles = max(table.values(), key=len)
        print("\n| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
        for cells in table.values():
            print("| " + " | ".join(str(cells.get(title, "")) for title in titles) + " |")


def main():
    parser = Parser(description="Measure this device. Further flags are train.py's.", allow_abbrev=False)
    parser.add_argument("what", choices=["steps", "sampling", "table"])
    parser.add_argument("file", metavar="FILE", help="gets a line of JSON per measurement")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--images", type=positive_int, default=4, help="at once; steps: to begin with (4)")
    parser.add_argument("--most", type=positive_int, default=256, help="images per step (256)")
    parser.add_argument("--steps", type=positive_int, default=10,
                        help="timed steps, or the sampler's steps (10)")
    args, flags = parser.parse_known_args()
    if args.what == "table":
        rows = read_rows(Path(args.file))
        require(rows, f"{args.file}: no measurements in it; bash benchmarks/gpu.sh makes them")
        print_table(rows)
        return
    device = pick_device("auto")
    lacking = why_no_compile(device) if args.compile else ""
    require(not lacking, f"--compile: {lacking}; leave it out")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True            # as train.py
    precision = choose_precision("auto", device, Processes())
    cfg = read_flags(["--mixed-precision", precision, "--batch-size", str(args.images), *flags], 1)
    cfg.compile = args.compile
    settings = dict(measured=args.what, flags=" ".join(flags), model=cfg.model, vae_grad=cfg.vae_grad,
                    resolution=cfg.resolution, compiled=cfg.compile, precision=precision)
    measure = steps if args.what == "steps" else sampling
    measure(args, cfg, device, settings)


if __name__ == "__main__":
    run_command(main, less_memory="smaller sizes, by the variables of gpu.sh")
