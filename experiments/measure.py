"""measure.py: what start-up, steps, sampling and evaluation take here, on random weights and without network.

    bash experiments/gpu.sh                                  all of it, and the table
    python experiments/measure.py startup FILE FLAGS         a run until its third step, part by part
    python experiments/measure.py steps FILE FLAGS           steps of 4, 8, 16, ... images, until memory ends
    python experiments/measure.py sampling FILE FLAGS        pictures a second, without and with guidance
    python experiments/measure.py evaluating FILE            pictures a second through fid.py's networks
    python experiments/measure.py comparison FILE RUN...     what runs of train.py and fid.py have come to
    python experiments/measure.py table FILE                 all of FILE in markdown

FLAGS are train.py's (files that they name are not read) and --compile. Each measurement is at once a line of
JSON at the end of FILE; what stands there is not measured again by `steps`, which may be stopped at any time.
"""
import time

STARTED = time.perf_counter()

import atexit
import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))                       # the six modules are there
import fid
import train
from data.images import ImageFolder, end_loaders
from experiments.memory import read_flags
from sample import Model, sample_images
from support.commands import Parser, UserError, memory_ended, positive_int, run_command
from support.devices import Processes, choose_precision, pick_device, why_no_compile
from support.profile import peak_flops

IMPORTED = time.perf_counter()
MEASURED = "startup", "steps", "sampling", "evaluating", "comparison"


# --- The file -----------------------------------------------------------------------------------------------

def read_rows(file):
    """The measurements in a file, dicts; those that a kill cut off are left out."""
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def write_row(file, device, row):
    """Append a measurement: a dict of plain values."""
    card = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
    line = json.dumps(dict(device=card, torch=torch.__version__) | row)
    print(line, flush=True)
    with open(file, "a") as f:
        f.write(line + "\n")


# --- The measurements ---------------------------------------------------------------------------------------

def wait_for(device):
    getattr(torch, device.type).synchronize()


def startup(args, cfg, device, settings):
    """What train.main does until the third step of a run, and the counting of FLOPs that --profile adds. Each
    part is written as it ends: where time runs out, the file shows in which."""
    def lap(what, since):
        wait_for(device)
        write_row(args.file, device, settings | dict(what=what, seconds=time.perf_counter() - since))
        return time.perf_counter()

    write_row(args.file, device, settings | dict(what="imports", seconds=IMPORTED - STARTED))
    torch.zeros(1, device=device)
    since = lap("flags and the device's context", IMPORTED)
    dataset = ImageFolder(cfg.data_dir, cfg.resolution)
    m = train.build(cfg, device)
    since = lap("building the networks", since)
    images = train.measure_latents(m, dataset)
    since = lap(f"latent statistics of {images} images", since)
    train.flops_of_a_step(m, cfg)
    since = lap("counting FLOPs (--profile alone)", since)
    train.wrap(m, cfg, 1)
    torch.backends.cudnn.benchmark = True
    atexit.register(end_loaders)
    loader = iter(train.load_run(m, cfg, dataset, 0, Processes()))
    batches = [next(loader) for _ in range(3)]
    since = lap("the loader and three batches", since)
    compiling = ", with compiling" if cfg.compile else ""
    for k, name in enumerate([f"first step{compiling}", "second step", "third step"]):
        train.run_step(m, cfg, k, batches[k], 0, 1)
        since = lap(name, since)


def random_batch(m, cfg):
    """A batch as the loader gives it, pinned for a GPU."""
    images = torch.randint(256, (cfg.batch_size, 3, cfg.resolution, cfg.resolution), dtype=torch.uint8)
    batch = [images, torch.zeros(cfg.batch_size, dtype=torch.long)]
    if cfg.cache_latents:
        channels, *size = m.latent_shape
        batch.append(torch.randn(cfg.batch_size, 2 * channels, *size).half())
    if m.device.type == "cuda":
        batch = [tensor.pin_memory() for tensor in batch]
    return [*batch[:2], [""] * cfg.batch_size, *batch[2:]]


def seconds_a_step(m, cfg, batch, first, steps):
    """Of steps `first` and on; the device is waited for at the ends alone."""
    wait_for(m.device)
    start = time.perf_counter()
    for k in range(first, first + steps):
        train.run_step(m, cfg, k, batch, 0, 1)
    wait_for(m.device)
    return (time.perf_counter() - start) / steps


def steps(args, cfg, device, settings):
    """A step's time and memory for args.images images in it, twice as many, ..., until memory or args.most
    ends it. Compiled, it begins with the most that went eagerly: to compile for each would take long."""
    rows = [row for row in read_rows(args.file) if row.get("flags") == settings["flags"]]
    went = {(row["compiled"], row["images"]): "step" in row for row in rows if row["measured"] == "steps"}
    images, sizes = args.images, []
    if cfg.compile:
        images = max([images, *(n for compiled, n in went if went[compiled, n] and not compiled)])
    while images <= args.most and went.get((cfg.compile, images), True):      # but beyond where memory ended
        if (cfg.compile, images) not in went:
            sizes.append(images)
        images *= 2
    if not sizes:
        return
    peak = peak_flops(device, torch.bfloat16 if cfg.mixed_precision == "bf16" else None)
    m = train.build(cfg, device)
    flops = train.flops_of_a_step(m, cfg)
    train.wrap(m, cfg, 1)
    torch.backends.cudnn.benchmark = True
    for images in sizes:
        torch.compiler.reset()                              # else a second size would compile for any size
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        cfg.batch_size = images
        row = settings | dict(images=images, steps=args.steps, tflop=flops * images / 1e12,
                              peak_tflops=peak / 1e12)
        try:
            batch = random_batch(m, cfg)
            row["first_step"] = seconds_a_step(m, cfg, batch, 0, 1)
            seconds_a_step(m, cfg, batch, 1, 2)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)     # in the first, cuDNN tried what takes more
            row["step"] = seconds_a_step(m, cfg, batch, 3, args.steps)
        except (RuntimeError, MemoryError) as e:
            if memory_ended(e, "") is None:
                raise
            write_row(args.file, device, row | dict(ended=memory_ended(e, "fewer images at once")))
            return                                          # an error in a step leaves networks half frozen
        row["images_per_second"] = images / row["step"]
        row["share_of_peak"] = flops * images / row["step"] / peak
        if device.type == "cuda":
            row["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2 ** 30
        write_row(args.file, device, row)


def sampling(args, cfg, device, settings):
    """Images a second as sample.py draws them, args.images at a time, args.steps Euler steps; files apart."""
    m = train.build(cfg, device)
    model = Model(m.ema, m.vae, vars(cfg), 0, device)
    if cfg.compile:
        m.ema.compile_blocks()
        m.vae.decoder.compile()
    for scale in (1.0, 2.0):
        torch.compiler.reset()
        seconds = []
        for _ in range(2):                                              # the first compiles, and warms up
            start = time.perf_counter()
            sample_images(model, range(args.images), num_steps=args.steps, cfg_scale=scale,
                          mixed_precision=cfg.mixed_precision)
            wait_for(device)
            seconds.append(time.perf_counter() - start)
        write_row(args.file, device, settings | dict(
            images=args.images, num_steps=args.steps, cfg_scale=scale, first_seconds=seconds[0],
            images_per_second=args.images / seconds[1]))


def evaluating(args, device, settings):
    """Images a second through Inception (of random weights) and the network that fid.py takes here by itself:
    all of fid.collect, so with the sums for mean and covariance, but without reading files."""
    weights = Path(args.file).with_name("inception-random.pth")
    torch.save(timm.create_model("inception_v3", num_classes=1008, aux_logits=False).state_dict(), weights)
    images = torch.randint(256, (args.images, 3, args.resolution, args.resolution), dtype=torch.uint8)
    for net in (fid.load_features(fid.parse_args(["--inception-weights", str(weights)])),
                fid.load_features(fid.parse_args([]))):
        net.to(device, memory_format=fid.memory_format(device))
        needs = {"pool", "spatial", "logits", "rows"} if net.name == "inception" else {"pool", "rows"}
        seconds = []
        for batches in (1, args.steps):
            source = SimpleNamespace(path="random", n=batches * args.images, given={},
                                     batches=lambda *_: [images] * batches)
            start = time.perf_counter()
            fid.collect(source, net, needs, device=device, batch_size=args.images)
            seconds.append(time.perf_counter() - start)
        write_row(args.file, device, settings | dict(
            features=net.name, images=args.images, resolution=args.resolution,
            images_per_second=args.steps * args.images / seconds[1]))
    weights.unlink()


def comparison(args, device, settings, runs):
    """A row a run of train.py whose folder also has fd.json, of fid.py."""
    for run in map(Path, runs):
        judged = json.loads((run / "fd.json").read_text())
        name = "fid" if "fid" in judged else f"fd_{judged['features']}"
        last = read_rows(run / "metrics.jsonl")[-1]
        write_row(args.file, device, settings | dict(
            run=run.name, step=last["step"], samples=judged["n_samples"], distance=name, value=judged[name],
            val_psnr=last["val_psnr"], images_per_second=last["images_per_second"]))


# --- The table ----------------------------------------------------------------------------------------------

def markdown(heads, lines):
    """A table's lines: heads, then lists of cells."""
    rows = [heads, ["---"] * len(heads), *lines]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]


def regime(row):
    return "second stage" if row["vae_grad"] == "none" else "REPA-E"


def step_cells(row):
    """Milliseconds, images/s, share of the peak, GiB of a step that was measured, or what ended it."""
    if row is None:
        return ["", "", "", ""]
    if "step" not in row:
        return ["memory ends", "", "", ""]
    memory = f"{row['memory_gib']:.1f}" if "memory_gib" in row else ""
    rate = f"{row['images_per_second']:.1f}"
    return [f"{row['step'] * 1e3:.1f}", rate, f"{row['share_of_peak']:.0%}", memory]


def table(rows):
    """The lines of all tables. Of two measurements of the same the later counts."""
    of = {name: [row for row in rows if row.get("measured") == name] for name in MEASURED}
    lines = [f"{rows[-1]['device']}, PyTorch {rows[-1]['torch']}.", ""]
    laps = {(row["model"], row["resolution"], row["images"], row["what"]): row["seconds"]
            for row in of["startup"]}
    if laps:
        model, resolution, images, _ = next(iter(laps))
        lines += markdown([f"start-up of {model}, {resolution} pixels, {images} images a step", "s"],
                          [[what, f"{seconds:.2f}"] for (*_, what), seconds in laps.items()])
    found = {(row["model"], regime(row), row["images"], row["compiled"]): row for row in of["steps"]}
    if found:
        peaks = [row["peak_tflops"] for row in of["steps"]]
        cells = []
        for key in dict.fromkeys(key[:3] for key in found):
            cells.append([*key, *step_cells(found.get((*key, False))), *step_cells(found.get((*key, True)))])
        lines += [f"A step; precision: {of['steps'][-1]['precision']}; peak: of a matrix product measured in "
                  f"the same place, {min(peaks):.4g} to {max(peaks):.4g} TFLOP/s.", ""]
        lines += markdown(["", "", "images", "eager ms", "images/s", "peak", "GiB", "compiled ms", "images/s",
                           "peak", "GiB"], cells)
    rates = {(row["model"], row["num_steps"], row["images"], row["cfg_scale"], row["compiled"]):
             f"{row['images_per_second']:.2f}" for row in of["sampling"]}
    if rates:
        cells = []
        for key in dict.fromkeys(key[:4] for key in rates):
            model, num_steps, images, scale = key
            guided = "guided" if scale > 1 else "no guidance"
            cells.append([f"{model}, {num_steps} Euler steps, {images} at a time, {guided}",
                          rates.get((*key, False), ""), rates.get((*key, True), "")])
        lines += markdown(["sampling, images/s", "eager", "compiled"], cells)
    rates = {(row["features"], row["resolution"]): row["images_per_second"] for row in of["evaluating"]}
    if rates:
        lines += markdown(["evaluation", "images/s"],
                          [[f"{name}, {size} pixels", f"{rate:.1f}"] for (name, size), rate in rates.items()])
    runs = {row["run"]: row for row in of["comparison"]}
    if runs:
        lines += markdown(["run", "steps", "distance", "of samples", "PSNR, dB", "images/s in training"],
                          [[name, row["step"], f"{row['distance']} {row['value']:.1f}", row["samples"],
                            f"{row['val_psnr']:.2f}", f"{row['images_per_second']:.0f}"]
                           for name, row in runs.items()])
    parts = {row["part"]: [row["part"], row["outcome"], row["seconds"]] for row in rows if "part" in row}
    if parts:
        lines += markdown(["part", "outcome", "s"], parts.values())
    return lines


def main():
    parser = Parser(description="Measure this device. Further flags are train.py's.", allow_abbrev=False)
    parser.add_argument("what", choices=[*MEASURED, "table"])
    parser.add_argument("file", metavar="FILE", help="takes a line of JSON for each measurement")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--images", type=positive_int, default=4, help="at once; steps: to begin with (4)")
    parser.add_argument("--most", type=positive_int, default=256, help="images of a step (256)")
    parser.add_argument("--steps", type=positive_int, default=10,
                        help="that are timed; the sampler's; batches to evaluate (10)")
    parser.add_argument("--resolution", type=positive_int, default=256, help="pixels (256)")
    args, flags = parser.parse_known_args()
    if args.what == "table":
        rows = read_rows(args.file)
        if not rows:
            raise UserError(f"{args.file}: no measurements in it; bash experiments/gpu.sh makes them")
        print("\n".join(table(rows)))
        return
    device, settings = pick_device("auto"), dict(measured=args.what)
    if args.what == "evaluating":
        evaluating(args, device, settings)
        return
    if args.what == "comparison":
        comparison(args, device, settings, flags)
        return
    lacking = why_no_compile(device) if args.compile else ""
    if lacking:
        raise UserError(f"--compile: {lacking}; leave it out")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True            # as train.py
    precision = choose_precision("auto", device, Processes())
    size = ["--resolution", str(args.resolution), "--batch-size", str(args.images)]
    cfg = read_flags(["--mixed-precision", precision, *size, *flags], 1)
    cfg.compile = args.compile
    settings |= dict(flags=" ".join([*size[:2], *flags]), model=cfg.model, vae_grad=cfg.vae_grad,
                     resolution=cfg.resolution, compiled=cfg.compile, precision=precision)
    if args.what == "startup":
        startup(args, cfg, device, settings | dict(images=cfg.batch_size))
    elif args.what == "steps":
        steps(args, cfg, device, settings)
    else:
        sampling(args, cfg, device, settings)


if __name__ == "__main__":
    run_command(main, less_memory="smaller sizes, by the variables of gpu.sh")
