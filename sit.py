"""sit.py: the diffusion transformer over the latents, and the norm between it and the VAE.

SiT (arXiv 2401.08740) is DiT (arXiv 2212.09748) predicting a velocity; parameter names are the release's.
Latents are [B, C, h, w], tokens [B, N, D] with N = (h / patch) * (w / patch); t [B] is in [0, 1], unscaled.
"""
import math
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import Attention, Mlp, PatchEmbed

from support.commands import UserError
from vae import LATENT_EPS

# Blocks, width D, heads. T is the tiny preset's; S to XL are the papers'.
SIZES = {"T": (6, 256, 4), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def parse_model(name):
    """'SiT-XL/2' -> (blocks, width, heads, patch). Raises UserError."""
    size, _, patch = name.removeprefix("SiT-").partition("/")
    if not name.startswith("SiT-") or size not in SIZES or not patch.isdecimal() or int(patch) < 1:
        raise UserError(f"--model {name}: unknown; write SiT-SIZE/PATCH with SIZE one of {', '.join(SIZES)}")
    return *SIZES[size], int(patch)


class LatentNorm(nn.BatchNorm2d):
    """Batch norm without affine over latents [B, C, h, w] (paper, 3.2): keeps the moving latents normalised.

    Called, it normalises with the statistics of the micro-batch over all processes (biased variance), and
    `update_statistics` moves the running ones once per step. With fixed=True (over a frozen VAE, and for
    --fixed-latent-stats) it always normalises with the running ones, and these do not move. z must carry no
    graph: then it equals SyncBatchNorm(affine=False), and also runs on gloo."""

    def __init__(self, channels, fixed=False):
        super().__init__(channels, LATENT_EPS, affine=False)                      # momentum: 0.1
        self.fixed = fixed
        self.moments = []                       # of the micro-batches since the last update, [2, C] each
        self.count = 0                          # of the values per channel in them, over all processes

    def set_statistics(self, mean, std):
        """Set the running statistics, [C] each."""
        self.running_mean.copy_(mean)
        self.running_var.copy_(std.square() - self.eps)

    def forward(self, z):
        assert not z.requires_grad, "the latent norm takes sg(z)"
        if self.fixed:
            return self.normalize(z)
        world = dist.get_world_size() if dist.is_initialized() else 1
        d = z - self.running_mean.view(1, -1, 1, 1)          # shifted by the running mean: no cancellation
        means = torch.stack([d.mean((0, 2, 3)), d.square().mean((0, 2, 3))])
        if world > 1:                                         # the per-process batch sizes are equal
            dist.all_reduce(means)
            means /= world
        self.moments.append(means)
        self.count += z.numel() // z.shape[1] * world
        mean, var = means[0], means[1] - means[0].square()
        return (d - mean.view(1, -1, 1, 1)) / (var + self.eps).sqrt().view(1, -1, 1, 1)

    def update_statistics(self):
        """Once per optimizer step: move the running statistics towards the pooled moments of its
        micro-batches (unbiased variance)."""
        if self.moments:
            mean, square = torch.stack(self.moments).mean(0)                # micro-batches are equally large
            unbiased = (square - mean.square()) * (self.count / max(self.count - 1, 1))
            self.running_var.lerp_(unbiased, self.momentum)
            self.running_mean.lerp_(self.running_mean + mean, self.momentum)
            self.num_batches_tracked += 1
        self.moments, self.count = [], 0

    def stats(self):
        """(mean, std) that broadcast over latents."""
        return self.running_mean.view(1, -1, 1, 1), (self.running_var + self.eps).sqrt().view(1, -1, 1, 1)

    def normalize(self, z):
        """By the running statistics; gradients reach z."""
        mean, std = self.stats()
        return (z - mean) / std

    def denormalize(self, z):
        """The exact inverse of `normalize` (the release forgets eps here)."""
        mean, std = self.stats()
        return z * std + mean


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """t [B] -> [B, D]: cosines, then sines of 128 frequencies 10000^(-k/128), then an MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        freqs = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        self.register_buffer("freqs", freqs, persistent=False)

    def forward(self, t):
        args = t.float()[:, None] * self.freqs                                 # [B, 128]
        return self.mlp(torch.cat([args.cos(), args.sin()], dim=1))


class SiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: c [B, D] gives shift, scale, gate for attention, then for MLP."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn.fused_attn = torch.accelerator.is_available()       # the fused kernel is slower on a CPU
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # [B, D] each
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))            # [B, N, D]
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def sincos_positions(width, grid):
    """Fixed 2D positions [1, grid*grid, D] (MAE's, arXiv 2111.06377): the first half of the width encodes the
    column, the second the row, each sines first, then cosines."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega                       # [grid, D/4]
    one = torch.cat([angles.sin(), angles.cos()], dim=1)                                    # [grid, D/2]
    column, row = one.expand(grid, -1, -1), one[:, None].expand(-1, grid, -1)              # [grid, grid, D/2]
    return torch.cat([column, row], dim=2).reshape(1, grid * grid, width).float()


class SiT(nn.Module):
    """model: e.g. 'SiT-XL/2'; size: latent height = width; channels: of the latents; projectors: modules D ->
    C_i, one per target encoder, that read the raw output of block `encoder_depth` (counted from 1);
    fixed_stats: of the latent norm. null_class: the label for "no label", num_classes, or None when cfg_prob
    is 0. Raises UserError for an unknown model, a patch that does not divide the latent size, or a depth out
    of range."""

    def __init__(self, model, size, channels, num_classes, cfg_prob=0.1, qk_norm=False, encoder_depth=8,
                 projectors=(), fixed_stats=False):
        super().__init__()
        depth, width, heads, patch = parse_model(model)
        if size % patch:
            raise UserError(f"--model {model}: patch {patch} does not divide the latents' {size}x{size}")
        if not 1 <= encoder_depth <= depth:
            raise UserError(f"--encoder-depth {encoder_depth}: {model} has blocks 1 to {depth}")
        self.size, self.patch, self.channels, self.width = size, patch, channels, width
        self.num_classes = num_classes
        self.encoder_depth = encoder_depth
        self.null_class = num_classes if cfg_prob > 0 else None
        self.x_embedder = PatchEmbed(size, patch, channels, width)
        self.t_embedder = TimestepEmbedder(width)
        labels = nn.Embedding(num_classes + (cfg_prob > 0), width)        # its last row is the null class
        self.y_embedder = nn.Sequential(OrderedDict(embedding_table=labels))   # named as released
        # A Parameter, as released, that never trains (there requires_grad(model, True) unfreezes it).
        self.pos_embed = nn.Parameter(sincos_positions(width, size // patch), requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(width, heads, qk_norm) for _ in range(depth))
        self.projectors = nn.ModuleList(projectors)
        self.final_layer = FinalLayer(width, patch * patch * channels)
        self.bn = LatentNorm(channels, fixed_stats)
        self.initialize()

    def initialize(self):
        """DiT's: Xavier linears, N(0, 0.02) embeddings, and zeros: every block starts as the identity."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.width, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for m in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(m.weight, std=0.02)
        for block in (*self.blocks, self.final_layer):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def compile_blocks(self):
        """torch.compile on the blocks (one graph serves all) and on nothing else: no graph break."""
        for block in self.blocks:
            block.forward = torch.compile(block.forward)      # so that checkpointing can go around it

    def first_blocks(self, x, t, y):
        """Blocks 1 to encoder_depth: their output h, the conditioning c, and h through the projectors."""
        c = self.t_embedder(t) + self.y_embedder(y)                                        # [B, D]
        x = self.x_embedder(x.contiguous())    # so its weight's gradient is contiguous, as in DDP's buckets
        h = x + self.pos_embed                                                             # [B, N, D]
        for block in self.blocks[:self.encoder_depth]:
            h = block(h, c)
        return h, c, [projector(h) for projector in self.projectors]                       # [B, N, C_i] each

    def forward_projections(self, x, t, y):
        """Blocks 1 to encoder_depth and the projectors alone; no later block, no head."""
        return self.first_blocks(x, t, y)[2]

    def forward(self, x, t, y):
        """Normalised noisy latents [B, C, h, w], t [B], labels [B] -> velocity [B, C, h, w] and a list of the
        projected hidden states, [B, N, C_i] each."""
        h, c, projected = self.first_blocks(x, t, y)
        for block in self.blocks[self.encoder_depth:]:
            h = block(h, c)
        return self.unpatchify(self.final_layer(h, c)), projected

    def unpatchify(self, tokens):
        b, n, _ = tokens.shape
        grid, p = math.isqrt(n), self.patch
        x = tokens.view(b, grid, grid, p, p, self.channels)                    # [B, h, w, p, q, C]
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, self.channels, grid * p, grid * p)


def infer_sit(tensors, args, what):
    """A new SiT whose sizes are inferred from a state dict without projectors (its weights are not loaded).
    args: settings of its training, which show how many label rows are classes. Raises UserError."""
    names = {(blocks, width): size for size, (blocks, width, _) in SIZES.items()}
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        size = patch * math.isqrt(tensors["pos_embed"].shape[1])
        rows = tensors["y_embedder.embedding_table.weight"].shape[0]
        model = f"SiT-{names[depth, width]}/{patch}"
    except (KeyError, ValueError):
        raise UserError(f"{what} is not a SiT of the sizes {', '.join(SIZES)}") from None
    num_classes = args.get("num_classes", rows - (args.get("cfg_prob", 0.1) > 0))
    return SiT(model, size, channels, num_classes, cfg_prob=float(rows > num_classes),
               qk_norm="blocks.0.attn.q_norm.weight" in tensors, encoder_depth=1)


# --- The interpolant (SiT, section 2): x_t = alpha(t) z + sigma(t) eps, velocity = dx_t/dt ------------------

def interpolant(t, path_type):
    """alpha, sigma and their derivatives at t, for path_type 'linear' or 'cosine'; t = 0 is the data."""
    if path_type == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    a = t * (math.pi / 2)
    return a.cos(), a.sin(), a.sin() * (-math.pi / 2), a.cos() * (math.pi / 2)


def interpolate(z, t, eps, path_type):
    """(x_t, velocity) for latents z, noise eps, both [B, C, h, w], and t [B]."""
    alpha, sigma, d_alpha, d_sigma = interpolant(t.view(-1, 1, 1, 1), path_type)
    return alpha * z + sigma * eps, d_alpha * z + d_sigma * eps


def sample_timesteps(shape, path_type, weighting, generator, device):
    """Training timesteps: uniform on [0, 1], or 'lognormal' (EDM's, arXiv 2206.00364) mapped onto a path."""
    if weighting == "uniform":
        return torch.rand(shape, generator=generator, device=device)
    s = torch.randn(shape, generator=generator, device=device).exp()           # sigma / alpha
    return s / (1 + s) if path_type == "linear" else torch.atan(s) * (2 / math.pi)
