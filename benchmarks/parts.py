"""parts.py: how fast layers of the VAE are, each alone: this decides which forms vae.py has for CUDA."""
from unittest.mock import patch

import torch
import torch._inductor.config
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import vae
from benchmarks.profile_step import seconds_per_step
from support.devices import memory_format

# {name: (what vae.on_cuda answers, whether torch.compile's layout optimization is forced)}
FORMS = {"plain": (False, False), "plain, forced layout": (False, True), "for CUDA": (True, False)}


def measure_layer(layer, shape, cfg, m):
    """A row of a layer with an input of this shape: milliseconds and TFLOP/s of forward and backward pass
    together (counted as three forward passes); milliseconds of copying the input to NCHW and back."""
    dtype = torch.bfloat16 if cfg.mixed_precision == "bf16" else torch.float32
    x = torch.randn(shape, device=m.device, dtype=dtype).to(memory_format=memory_format(m.device))

    def forward():
        with m.autocast():
            return layer(x)

    def both_passes(k):
        y = forward()
        torch.autograd.grad(y, (x, *layer.parameters()), y.detach())                # a gradient of y's layout

    def copy(k):
        x.detach().contiguous().contiguous(memory_format=torch.channels_last)

    x.requires_grad_()
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        forward()
    row = {}
    for name, function in dict(ms=both_passes, copies_ms=copy).items():
        seconds_per_step(function, range(3))                                    # compiles, chooses kernels
        row[name] = 1e3 * seconds_per_step(function, range(10))
    row["tflops"] = 3 * counter.get_total_flops() / row["ms"] / 1e9
    return row


def parts(args, cfg, m):
    """Rows of the decoder's layers, with --compile compiled: a convolution of each level; in each of FORMS a
    residual block, the upsampling of each level, and the attention."""
    up = m.vae.decoder.up
    for p in m.vae.parameters():
        p.data.normal_()                                    # some start as zeros, which a GPU multiplies faster
    layers = [(level.block[-1].conv2, i) for i, level in enumerate(up)]
    layers += [(up[0].block[-1], 0), *((up[i].upsample, i) for i in range(1, len(up))),
               (m.vae.decoder.mid.attn_1, len(up) - 1)]
    for layer, i in layers:
        shape = args.images, up[i].block[-1].conv2.in_channels, cfg.resolution >> i, cfg.resolution >> i
        if cfg.compile:
            layer.compile()
        for form, (on_cuda, forced) in FORMS.items():
            torch.compiler.reset()
            with (patch.object(vae, "on_cuda", lambda x: on_cuda),
                  torch._inductor.config.patch(force_layout_optimization=forced)):
                row = measure_layer(layer, shape, cfg, m)
            yield dict(layer=type(layer).__name__, input=shape, form=form) | row
            if isinstance(layer, nn.Conv2d):
                break
