"""memory.py: the GPU memory that training takes, estimated where there is no GPU, without allocating it.

    python experiments/memory.py                        the table of docs/performance.md, in minutes
    python experiments/memory.py [--gpus N] FLAGS       one command's, by the flags that train.py would get

The networks of train.build and the steps of train.run_step run on PyTorch's fake tensors, which have a shape
and no memory, on a CPU made to follow CUDA's rules of precision. The bytes of all storages alive are summed:
weights, EMA, gradients, AdamW's moments, what is kept for the backward passes. Not in the sum are what
kernels take for themselves, fragmentation and the CUDA context; the step is the one of --no-compile, in bf16
unless the flags say otherwise. Files that they name are not read: the weights are fake too, and the VAE is
that of --vae.
"""
import gc
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))                       # the six modules are there
import train
from support.commands import Parser, UserError, positive_int, run_command

RUNS = ["--preset sdvae-xl2", "--preset invae-xl1", "--preset sdvae-xl2 --model SiT-L/2",
        "--preset sdvae-xl2 --model SiT-B/2", "--preset e2e-sdvae-xl2", "--preset e2e-vavae-xl1"]
IMAGES = [4, 8, 16, 32, 64]                                                  # a GPU in a step, of the table


class Tally(TorchDispatchMode):
    """Counts the bytes of the storages of all tensors that operations return, as long as they live."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = WeakIdKeyDictionary(), 0, 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.alive:
            size = storage.nbytes()
            self.alive[storage] = weakref.ref(storage, lambda _: self.free(size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, result)
        return result


def in_float32(function):
    """As under CUDA's autocast, which has a rule of float32 for this function; a CPU's has none."""
    def call(x, *args, **kwargs):
        return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)
    return call


CUDA_RULES = {name: in_float32(getattr(F, name)) for name in ("group_norm", "layer_norm", "interpolate")}


def build(cfg):
    """The Networks of train.build on fake tensors, attention fused as on a GPU."""
    def copied(tensor, memo):
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    # What fake tensors cannot do: move to another layout, which changes no size; be copied by copy.deepcopy;
    # have a value, which timm wants for its rates of stochastic depth (they are zeros).
    with (patch.object(nn.Module, "to", lambda module, *args, **kwargs: module),
          patch.multiple(torch.Tensor, __deepcopy__=copied, item=lambda tensor: 0.0)):
        m = train.build(cfg, torch.device("cpu"))
    for block in (*m.sit.blocks, *m.ema.blocks):
        block.attn.fused_attn = True
    train.wrap(m, cfg, world=1)
    return m


def step(m, cfg, k, gpus):
    """The k-th step of one of so many processes."""
    share = cfg.batch_size // gpus
    batch = [torch.empty(share, 3, cfg.resolution, cfg.resolution, dtype=torch.uint8),
             torch.zeros(share, dtype=torch.long), [""] * share]
    if cfg.cache_latents:
        channels, *size = m.latent_shape
        batch.append(torch.empty(share, 2 * channels, *size, dtype=torch.float16))
    train.run_step(m, cfg, k, batch, 0, gpus)


def estimate(cfg, batch_sizes, gpus):
    """Peak bytes on each of `gpus` GPUs, for each of these global batch sizes: of a step after the first,
    which makes AdamW's moments. And last: of the pictures that process 0 draws between steps, 32 images
    through the VAE at once. DDP's gradients are views into its buckets, which last from step to step."""
    peaks, buckets = [], []
    with FakeTensorMode(), Tally() as tally, patch.multiple(F, **CUDA_RULES):
        m = build(cfg)
        gc.collect()
        trained = [p for optimizer in m.trained.values() for p in optimizer.param_groups[0]["params"]]
        if gpus > 1:
            buckets = [torch.zeros_like(p) for p in trained]
        for k, size in enumerate([batch_sizes[0], *batch_sizes]):
            for p, bucket in zip(trained, buckets):
                p.grad = bucket
            cfg.batch_size, tally.peak = size, tally.now
            step(m, cfg, k, gpus)
            peaks.append(tally.peak)
        tally.peak = tally.now
        with torch.no_grad(), m.autocast():
            m.vae.decode(m.vae.encode(torch.empty(32, 3, cfg.resolution, cfg.resolution)).mean)
    return [*peaks[1:], tally.peak]


def read_flags(flags, gpus):
    """The Config of train.py's flags, with random weights in place of all files. Raises UserError."""
    cfg = train.parse_config(["--data-dir", ".", "--vae-ckpt", "any", *flags])
    parts = gpus * cfg.gradient_accumulation_steps
    if cfg.batch_size % parts:
        raise UserError(f"--batch-size {cfg.batch_size}: not divisible by {parts}, --gpus times "
                        "--gradient-accumulation-steps")
    if cfg.mixed_precision == "auto":
        cfg.mixed_precision = "bf16"
    files = dict(vae_ckpt="", init_from="", enc_ckpt="", vgg_ckpt="", lpips_ckpt="", disc_pretrained_ckpt="")
    return replace(cfg, **files, allow_random_weights=True, num_classes=cfg.num_classes or 1000,
                   compile=False, disc_start=0)          # the VAE feels the discriminator from the first step


def main():
    parser = Parser(description="Estimate the GPU memory of training. Further flags are those of train.py.",
                    allow_abbrev=False)
    parser.add_argument("--gpus", type=positive_int, default=8, help="that share each batch (8)")
    args, flags = parser.parse_known_args()
    if flags:
        cfg = read_flags(flags, args.gpus)
        training, pictures = estimate(cfg, [cfg.batch_size], args.gpus)
        print(f"{training / 2 ** 30:.1f} GiB a GPU in training, {pictures / 2 ** 30:.1f} GiB on the first "
              "when it draws pictures; kernels, fragmentation and the CUDA context take more")
        return
    print("| flags, images a GPU | " + " | ".join(map(str, IMAGES)) + " | pictures |")
    print("|---" * (len(IMAGES) + 2) + "|")
    for run in RUNS:
        for more in ([], ["--gradient-checkpointing"]):
            cfg = read_flags([*run.split(), *more], args.gpus)
            peaks = estimate(cfg, [args.gpus * n for n in IMAGES], args.gpus)
            cells = [f"{peak / 2 ** 30:.1f}" for peak in peaks]
            print(f"| `{' '.join([run, *more])}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_command(main)
