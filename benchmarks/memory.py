"""memory.py: the GPU memory that training needs, estimated without a GPU and without allocating it.

    python benchmarks/memory.py                        the table of docs/performance.md, in minutes
    python benchmarks/memory.py [--gpus N] FLAGS       for one command, by train.py's flags

The networks of train.build and the steps of train.run_step run on PyTorch's fake tensors, which have a shape
and no memory, on a CPU made to follow CUDA's autocast. It adds up the bytes of all storages alive: weights,
EMA, gradients, AdamW's moments, activations kept for the backward passes. Not included are workspaces of
kernels, fragmentation and the CUDA context. The step is that of --no-compile, in bf16 unless the flags choose
otherwise. Files that the flags name are not read: the weights are fake too, and the VAE is that of --vae.
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

sys.path.insert(0, str(Path(__file__).parents[1]))                                 # the six modules are there
import train
from sit import SiTBlock
from support.commands import Parser, positive_int, require, run_command

RUNS = ["--preset sdvae-xl2", "--preset invae-xl1", "--preset sdvae-xl2 --model SiT-B/2", "--preset sd35-xl2",
        "--preset sdvae-xl2 --resolution 512", "--preset e2e-sdvae-xl2"]
IMAGES = [4, 8, 16, 32, 64]                                                  # per GPU and step, in the table


class Tally(TorchDispatchMode):
    """Counts the bytes of the storages of all tensors that operations return, until they are freed."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = WeakIdKeyDictionary(), 0, 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.alive:
            size = storage.nbytes()
            self.alive[storage] = weakref.finalize(storage, self.free, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, result)
        return result


def in_float32(function):
    """The function as under CUDA's autocast, which runs it in float32; a CPU's autocast does not."""
    def call(x, *args, **kwargs):
        return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)
    return call


CUDA_RULES = {name: in_float32(getattr(F, name)) for name in ("group_norm", "layer_norm", "interpolate")}


def build(cfg):
    """The Networks of train.build on fake tensors, with fused attention as on a GPU."""
    def copied(tensor, memo):
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    # What fake tensors cannot do: change their memory layout (which changes no size); be copied by
    # copy.deepcopy; have a value, which timm needs for its stochastic depth (it is zero).
    with (patch.object(nn.Module, "to", lambda module, *args, **kwargs: module),
          patch.multiple(torch.Tensor, __deepcopy__=copied, item=lambda tensor: 0.0)):
        m = train.build(cfg, torch.device("cpu"))
    for module in (*m.sit.modules(), *m.ema.modules()):
        if isinstance(module, SiTBlock):
            module.attn.fused_attn = True
    train.wrap(m, cfg, world=1)
    return m


def random_batch(m, cfg, n):
    """A batch of n images as the loader gives it."""
    batch = [torch.randint(256, (n, 3, cfg.resolution, cfg.resolution), dtype=torch.uint8),
             torch.zeros(n, dtype=torch.long), [""] * n]
    if cfg.cache_latents:
        channels, *size = m.latent_shape
        batch.append(torch.randn(n, 2 * channels, *size).half())
    return batch


def estimate(cfg, batch_sizes, gpus):
    """Peak bytes on each of `gpus` GPUs, for each of these global batch sizes: of a step after the first,
    which creates AdamW's moments. Last: of the reconstructions that process 0 makes between steps, 32 images
    at once through the VAE. DDP's gradients are views into its buckets, which last from step to step."""
    peaks, buckets = [], []
    with FakeTensorMode(), Tally() as tally, patch.multiple(F, **CUDA_RULES):
        m = build(cfg)
        gc.collect()
        trained = [p for optimizer in m.optimizers.values() for p in optimizer.param_groups[0]["params"]]
        if gpus > 1:
            buckets = [torch.zeros_like(p) for p in trained]
        for k, size in enumerate([batch_sizes[0], *batch_sizes]):
            if gpus > 1:
                for p, bucket in zip(trained, buckets, strict=True):
                    p.grad = bucket
            cfg.batch_size, tally.peak = size, tally.now
            train.run_step(m, cfg, k, random_batch(m, cfg, size // gpus), 0, gpus)
            peaks.append(tally.peak)
        tally.peak = tally.now
        with torch.no_grad(), m.autocast():
            m.vae.decode(m.vae.encode(torch.empty(32, 3, cfg.resolution, cfg.resolution)).mean)
    return [*peaks[1:], tally.peak]


def read_flags(flags, gpus):
    """The Config of train.py's flags, with random weights instead of all files. Raises UserError."""
    cfg = train.parse_config(["--data-dir", ".", "--vae-ckpt", "any", *flags])
    micro_batches = gpus * cfg.gradient_accumulation_steps
    require(cfg.batch_size % micro_batches == 0, f"--batch-size {cfg.batch_size}: not divisible by "
            f"{micro_batches}, --gpus times --gradient-accumulation-steps")
    if cfg.mixed_precision == "auto":
        cfg.mixed_precision = "bf16"
    files = dict(vae_ckpt="", init_from="", enc_ckpt="", vgg_ckpt="", lpips_ckpt="", disc_pretrained_ckpt="")
    vae = cfg.vae or train.PRESETS[cfg.preset]["vae"]        # not that of a file, which is not read
    return replace(cfg, **files, vae=vae, allow_random_weights=True, num_classes=cfg.num_classes or 1000,
                   compile=False, disc_start=0)                # with the adversarial loss from the first step


def main():
    parser = Parser(description="Estimate the GPU memory of training. Further flags are those of train.py.",
                    allow_abbrev=False)
    parser.add_argument("--gpus", type=positive_int, default=8, help="that share each batch (8)")
    args, flags = parser.parse_known_args()
    images = IMAGES
    commands = [run + more for run in RUNS for more in ("", " --gradient-checkpointing")]
    if flags:
        images = [read_flags(flags, args.gpus).batch_size // args.gpus]
        commands = [" ".join(flags)]
    print("GiB per GPU (grids: on the first, for its image grids); kernels, fragmentation and the CUDA "
          "context need more")
    print(f"\n| flags, images per GPU | {' | '.join(map(str, images))} | grids |")
    print("|---" * (len(images) + 2) + "|")
    for command in commands:
        peaks = estimate(read_flags(command.split(), args.gpus), [args.gpus * n for n in images], args.gpus)
        print(f"| `{command}` | {' | '.join(f'{peak / 2 ** 30:.1f}' for peak in peaks)} |", flush=True)


if __name__ == "__main__":
    run_command(main)
