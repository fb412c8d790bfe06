"""vae.py: where pixels meet latents.

    python vae.py export CKPT DIR              the VAE of a training checkpoint as a diffusers AutoencoderKL
    python vae.py reconstruct VAE IMAGES       what a VAE makes of images: pictures, PSNR, SSIM, LPIPS
    python vae.py latents IMAGES VAE VAE ...   their latents in colour side by side, and their spectra

The floor of the house (it imports nothing of ours). From top to bottom: the one-line error that every command
ends in, reading and writing files, pictures, then the autoencoder: AutoencoderKL with the released
architectures (f8d4 = SD-VAE, f16d32 = VA-VAE/IN-VAE) and a small one, the PatchGAN discriminator, the
perceptual distances.

Images are float tensors [B, 3, H, W] in [-1, 1]; latents are [B, C, h, w].
"""
import argparse
import errno
import hashlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------------------
# Commands: a mistake of the person at the keyboard is one line on stderr and exit code 2, never a traceback
# ------------------------------------------------------------------------------------------------------------

class UserError(Exception):
    """A mistake in a flag, a path or a file: the message says what was wrong and what to type instead."""


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES,            # a full or read-only disk,
               errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)       # a file in a folder's place


class Parser(argparse.ArgumentParser):
    """argparse without the usage block: a bad flag is one line too."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def run_command(main):
    """Run `main()`; a UserError becomes one line and exit code 2; bugs keep their traceback."""
    try:
        main()
    except (UserError, OSError) as e:
        if isinstance(e, OSError) and e.errno not in DISK_ERRORS:
            raise
        rank = os.environ.get("RANK", "0")
        tqdm.write(f"error{'' if rank == '0' else f' (rank {rank})'}: {e}", file=sys.stderr)      # above bars
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


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


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------

def write_atomic(path, write):
    """Write a file whole or not at all: `write(temporary path)`, then sync, then rename to `path`."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:                      # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot write {path}: {str(e).splitlines()[0]}") from None
    finally:
        tmp.unlink(missing_ok=True)


def allocate_rows(path, dtype, shape):
    """A new .npy file with all of its bytes on the disk: a full one shows here, not as a bus error later."""
    try:
        np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "rb+") as f:
                os.posix_fallocate(f.fileno(), 0, path.stat().st_size)
    except OSError as e:
        path.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {e.strerror}") from None


READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, SyntaxError,
               zipfile.BadZipFile, zlib.error, Image.DecompressionBombError)             # of damaged files


def load_tensors(path):
    """Read a .pt / .pth / .safetensors file to CPU; nothing is unpickled but tensors, plain containers and
    the argparse.Namespace of released checkpoints. Raises UserError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_zip := zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:        # torch compresses nothing: a bomb is not its file
                if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                    raise UserError(f"{path}: a compressed archive, not a weights file")
        with torch.serialization.safe_globals([argparse.Namespace]):      # mmap: only what is used is read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as e:
        code = re.search("GLOBAL|unsupported class|unrecognized function", str(e))
        reason = "it holds more than tensors, refused" if code else "damaged"
        raise UserError(f"{path}: not a readable weights file ({reason})") from None
    except (*READ_ERRORS, SafetensorError) as e:
        raise UserError(f"{path}: not a readable weights file ({one_line(e)})") from None


def hash_tensors(module):
    """SHA-256, still open, of the values in a module's state dict."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest


def one_line(e):
    return (str(e).splitlines() or [type(e).__name__])[0][:80]


def load_into(module, state, what):
    """load_state_dict, where a mismatch is one line that names the first offending tensor."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError) as e:                                     # TypeError: it is not a dict
        reason = str(e).splitlines()[:2][-1].strip()[:160]
        raise UserError(f"{what}: {reason}; is this a checkpoint of another model?") from None


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def list_images(folder, times=None):
    """Every image file under `folder`, any nesting, sorted. times: a dict to which each folder's modification
    time is added. Raises UserError where there is no image."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    found, times = [], {} if times is None else times
    for root, _, names in os.walk(folder, followlinks=True):
        times[root] = os.stat(root).st_mtime_ns
        found += [Path(root) / name for name in names
                  if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")]
    if not found:
        raise UserError(f"{folder}: no images in it (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(found)


def center_crop(image, size):
    """ADM's crop: halve with a box filter while both sides stay >= 2 * size, bicubic to `size`, crop the
    middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, size=None):
    """An image file as uint8 [3, H, W]; transparency goes onto white; with `size`, ADM's centre crop.
    Raises UserError when the file cannot be decoded."""
    try:
        with Image.open(path) as image:
            if size is not None:
                image.draft("RGB", (2 * size, 2 * size))      # lets the JPEG decoder skip what is halved away
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode.startswith("I"):                       # 16 bits: Pillow's convert would clip them
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            image = image.convert("RGB")
            image = image if size is None else center_crop(image, size)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except READ_ERRORS as e:
        raise UserError(f"{path}: cannot be read ({one_line(e)})") from None


def to_float(images):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float().div(127.5).sub(1)


def to_uint8(images):
    """Float [-1, 1] -> uint8, rounded (the release truncates, which darkens by half a level)."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def image_grid(images, columns, scale=1, gap=2):
    """Tile uint8 images [N, 3, H, W] row by row into one PIL image, each enlarged `scale` times."""
    n, _, h, w = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        canvas[top:top + h, left:left + w] = image
    grid = Image.fromarray(canvas)
    return grid.resize((grid.width * scale, grid.height * scale), Image.NEAREST)


def save_png(image, path):
    """Write a PIL image as PNG, whole or not at all."""
    write_atomic(path, lambda tmp: image.save(tmp, format="PNG", optimize=True))


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#17becf", "#7f7f7f")


def line_chart(series, title, size=(560, 320)):
    """{name: (xs [n], ys [n] or [runs, n])} as a PIL image: a line through the mean, a bar from the least to
    the greatest of several runs, a legend."""
    series = {name: (np.asarray(xs, float), np.atleast_2d(np.asarray(ys, float))) for name, (xs, ys) in
              series.items()}
    image, font = Image.new("RGB", size, "white"), ImageFont.load_default(13)
    draw, (left, top, right, bottom) = ImageDraw.Draw(image), (64, 34, size[0] - 16, size[1] - 28)

    def axis(values, first, last):
        """(value -> pixel, the values to mark): marks 1, 2 or 5 times a power of ten apart."""
        low, high = float(values.min()), float(values.max())
        high += 1e-9 + (high == low)
        step = 10 ** np.floor(np.log10((high - low) / 4))
        step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 6)
        marks = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
        return lambda v: first + (v - low) / (high - low) * (last - first), marks

    to_x, x_marks = axis(np.concatenate([xs for xs, _ in series.values()]), left + 6, right - 6)
    to_y, y_marks = axis(np.concatenate([ys.ravel() for _, ys in series.values()]), bottom - 6, top + 6)
    draw.text((left, 8), title, "black", font)
    for y in y_marks:
        draw.line((left, to_y(y), right, to_y(y)), "#dddddd")
        draw.text((left - 6, to_y(y)), f"{y:.4g}", "black", font, anchor="rm")
    for x in x_marks:
        draw.line((to_x(x), bottom, to_x(x), bottom + 4), "black")
        draw.text((to_x(x), bottom + 6), f"{x:.6g}", "black", font, anchor="mt")
    draw.rectangle((left, top, right, bottom), outline="black")
    for k, (name, (xs, ys)) in enumerate(series.items()):
        colour = COLOURS[k % len(COLOURS)]
        points = [(to_x(x), to_y(y)) for x, y in zip(xs, ys.mean(0))]
        draw.line(points, colour, 2)
        for (x, y), column in zip(points, ys.T):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
            draw.line((x, to_y(column.min()), x, to_y(column.max())), colour)
        draw.text((right - 8, top + 6 + 16 * k), name, colour, font, anchor="ra")
    return image


def principal_components(z):
    """Of latents [B, C, h, w]: their values [B*h*w, C] less the mean, the variances of their principal
    components, largest first, [C], and these components, [C, C], a column each, the largest loading
    positive."""
    x = z.float().permute(0, 2, 3, 1).flatten(0, 2)                            # [B*h*w, C]
    x = x - x.mean(0)
    variances, axes = torch.linalg.eigh(x.T @ x / len(x))                      # ascending
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return x, variances.flip(0).clamp_min(0), axes.flip(1)


def latents_in_colour(z, stride=1):
    """The first three principal components of latents [B, C, h, w] as uint8 RGB [B, 3, h * stride, w *
    stride]."""
    x, _, axes = principal_components(z)
    x = x @ axes[:, :3]
    x = x / (2.5 * x.std(0, correction=0) + 1e-6)                              # +-2.5 sigma fills the range
    colour = to_uint8(x.unflatten(0, (z.shape[0], *z.shape[2:])).permute(0, 3, 1, 2))
    return colour.repeat_interleave(stride, 2).repeat_interleave(stride, 3)


# ------------------------------------------------------------------------------------------------------------
# The autoencoder (parameter names of CompVis' latent-diffusion, as the released checkpoints have them)
# ------------------------------------------------------------------------------------------------------------

LATENT_EPS = 1e-4                                          # of the latent norm between VAE and SiT
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"

# Attention is fixed to levels, whatever the input's size: f16d32 was built for 256 pixels with attention at
# 16x16. The last row is the tiny preset's.
VAES = {
    "f8d4": dict(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_levels=(), latent_channels=4),
    "f16d32": dict(ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_levels=(4,), latent_channels=32),
    "f4d8": dict(ch=24, ch_mult=(1, 2, 4), num_res_blocks=1, attn_levels=(), latent_channels=8, groups=8),
}


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).mT.unsqueeze(1) for conv in (self.q, self.k, self.v))    # [B, 1, HW, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).mT.reshape(x.shape))


def _downsample(c):
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2)))


def _upsample(c):
    return nn.Sequential(OrderedDict(scale=nn.Upsample(scale_factor=2), conv=nn.Conv2d(c, c, 3, padding=1)))


def _level(cin, cout, blocks, attention, groups):
    level = nn.Module()
    level.block = nn.ModuleList(ResnetBlock(cin if j == 0 else cout, cout, groups) for j in range(blocks))
    level.attn = nn.ModuleList(AttnBlock(cout, groups) if attention else nn.Identity() for _ in range(blocks))
    return level


def _middle(c, groups):
    mid = nn.Module()
    mid.block_1, mid.block_2 = ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)
    mid.attn_1 = AttnBlock(c, groups)
    return mid


def _run_level(level, h):
    for block, attn in zip(level.block, level.attn):
        h = attn(block(h))
    return h


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> moments [B, 2C, h, w]."""

    def __init__(self, ch, ch_mult, num_res_blocks, attn_levels, latent_channels, groups=32):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (cin, cout) in enumerate(zip([ch] + widths, widths)):
            level = _level(cin, cout, num_res_blocks, i in attn_levels, groups)
            level.downsample = _downsample(cout) if i < len(widths) - 1 else nn.Identity()
            self.down.append(level)
        self.mid = _middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level.downsample(_run_level(level, h))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents [B, C, h, w] -> images [B, 3, H, W]; `up.0` is the level of full resolution and runs last."""

    def __init__(self, ch, ch_mult, num_res_blocks, attn_levels, latent_channels, groups=32):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for i, (cin, cout) in enumerate(zip(widths[1:] + widths[-1:], widths)):
            level = _level(cin, cout, num_res_blocks + 1, i in attn_levels, groups)
            level.upsample = _upsample(cout) if i > 0 else nn.Identity()
            self.up.append(level)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(self.up):
            h = level.upsample(_run_level(level, h))
        return self.conv_out(F.silu(self.norm_out(h)))


class DiagonalGaussian:
    """The posterior q(z|x): N(mean, exp(logvar)) per latent value, from moments [B, 2C, h, w]."""

    def __init__(self, moments):
        self.mean, logvar = moments.float().chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)

    def sample(self, noise):
        """mean + std * noise, with noise ~ N(0, I) of the mean's shape [B, C, h, w]."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self):
        """KL(q || N(0, I)) in nats, summed over the latent's dimensions: [B]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """VAE of latent diffusion (arXiv 2112.10752), by name: 'f8d4', 'f16d32' or 'f4d8'.

    stride: pixels per latent position; latent_channels: C."""

    def __init__(self, name):
        super().__init__()
        if name not in VAES:
            raise UserError(f"--vae {name}: unknown architecture; take one of {', '.join(VAES)}")
        cfg = VAES[name]
        c = self.latent_channels = cfg["latent_channels"]
        self.name, self.levels = name, len(cfg["ch_mult"])
        self.stride = 2 ** (self.levels - 1)
        self.encoder, self.decoder = Encoder(**cfg), Decoder(**cfg)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def latent_size(self, resolution):
        """Height = width of the latents of square images. Raises UserError where the stride does not fit."""
        if resolution % self.stride:
            raise UserError(f"--resolution {resolution}: not divisible by the VAE's stride {self.stride}")
        return resolution // self.stride

    def encode(self, x):
        """Images [B, 3, H, W] in [-1, 1] -> DiagonalGaussian over [B, C, H/stride, W/stride]."""
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z):
        """Latents [B, C, h, w] -> images [B, 3, h*stride, w*stride], about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x, noise):
        """One pass for training: (posterior, z = its sample with `noise`, reconstruction of z)."""
        posterior = self.encode(x)
        z = posterior.sample(noise)
        return posterior, z, self.decode(z)


# ------------------------------------------------------------------------------------------------------------
# The autoencoder's file formats
# ------------------------------------------------------------------------------------------------------------

def diffusers_name(name, levels):
    """A parameter's name in diffusers' AutoencoderKL, from ours (CompVis'), for a VAE of so many levels."""
    for ours, theirs in ((r"\.up\.(\d)", lambda m: f".up_blocks.{levels - 1 - int(m[1])}"), # from the end
                         (r"\.down\.", ".down_blocks."), (r"\.block\.", ".resnets."),
                         (r"\.attn\.", ".attentions."),
                         (r"\.(down|up)sample\.", r".\1samplers.0."), ("nin_shortcut", "conv_shortcut"),
                         (r"\.mid\.block_(\d)", lambda m: f".mid_block.resnets.{int(m[1]) - 1}"),
                         (r"\.mid\.attn_1", ".mid_block.attentions.0"), (r"\.norm_out\.", ".conv_norm_out."),
                         (r"(attentions\.\d)\.norm\.", r"\1.group_norm."), (r"\.([qkv])\.", r".to_\1."),
                         (r"\.proj_out\.", ".to_out.0.")):
        name = re.sub(ours, theirs, name)
    return name


def from_diffusers(state, own, levels):
    """diffusers' state dict -> one with the names of `own`, attention's linear layers as 1x1 convolutions.
    Names that are not known stay, for `load_into` to report."""
    older = dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0")         # before diffusers 0.18
    ours, out = {diffusers_name(name, levels): name for name in own}, {}
    for name, tensor in state.items():
        name = re.sub(r"\.(query|key|value|proj_attn)\.", lambda m: f".{older[m[1]]}.", name)
        name = ours.get(name, name)
        out[name] = tensor[..., None, None] if tensor.ndim == 2 else tensor
    return out


def build_vae(state, what, name=None):
    """AutoencoderKL from a state dict of CompVis' or diffusers' names, of architecture `name` or whichever
    fits. Raises UserError, naming the first tensor that is wrong."""
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{what}: no state dict of a VAE in it")
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{what}: {key} holds values that are not finite")
    for candidate in [name] if name else VAES:
        with torch.device("meta"):
            vae = AutoencoderKL(candidate)
        own, ours = vae.state_dict(), state
        if "encoder.mid.block_1.conv1.weight" not in state:
            ours = from_diffusers(state, own, vae.levels)
        if name or {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in ours.items()}:
            load_into(vae := vae.to_empty(device="cpu"), ours, what)
            return vae
    raise UserError(f"{what}: its tensors fit none of the VAEs {', '.join(VAES)}")


def load_vae(path, name=None):
    """(AutoencoderKL, its latents' (mean [C], std [C]) or None) from a state dict (.pt, .safetensors;
    CompVis' or diffusers' names), a training checkpoint, a diffusers directory or a hub id. name: as in
    `build_vae`.

    The statistics come from the checkpoint's latent norm, the directory's config.json, or from the release's
    NAME-latents-stats.pt beside NAME.pt (latents_scale = 1 / std, latents_bias = mean). Raises UserError."""
    file, stats = Path(path), None
    if not file.exists() and is_hub_id(path):
        try:
            file = Path(snapshot_download(str(path), allow_patterns=["config.json", DIFFUSERS_FILE]))
        except Exception as e:                                           # hub errors come in many classes
            raise UserError(f"{path}: no such folder here, and not to be fetched from the hub "
                            f"({type(e).__name__}); without network give a local path") from None
    beside = file.parent / f"{file.stem}-latents-stats.pt"
    if file.is_dir():
        try:
            config = json.loads((file / "config.json").read_text())
            scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
            ones = torch.ones(config["latent_channels"])
            mean, std = (torch.tensor(config.get(key) or default) for key, default in
                         (("latents_mean", shift), ("latents_std", 1.0)))
            stats = mean * ones, std * ones / scale                  # pipelines decode z * std / scale + mean
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
            raise UserError(f"{path}: not a diffusers AutoencoderKL (config.json: {one_line(e)})") from None
        file = file / DIFFUSERS_FILE
    elif beside.is_file():
        try:
            saved = load_tensors(beside)
            stats = saved["latents_bias"].flatten().float(), 1 / saved["latents_scale"].flatten().float()
        except (TypeError, KeyError, AttributeError):
            raise UserError(f"{beside}: latents_scale and latents_bias are not in it") from None
    state = load_tensors(file)
    if isinstance(state, dict) and "ema" in state and "args" in state:
        if "vae" not in state:
            raise UserError(f"{path}: no VAE in this checkpoint, it was frozen; give the VAE's own file")
        if "bn.running_mean" in state["ema"]:
            mean, var = (state["ema"][f"bn.running_{name}"] for name in ("mean", "var"))
            stats = mean, (var + LATENT_EPS).sqrt()
        state = state["vae"]
    vae = build_vae(state, path, name)
    if stats and not all(s.shape == (vae.latent_channels,) and s.isfinite().all() for s in stats):
        raise UserError(f"{path}: its latent statistics are not {vae.latent_channels} finite numbers")
    return vae, stats


def is_hub_id(path):
    """Whether it reads as OWNER/NAME rather than as a file."""
    suffixes = (".pt", ".pth", ".ckpt", ".safetensors")
    return bool(re.fullmatch(r"[\w-]+/[\w.-]+", str(path))) and Path(path).suffix not in suffixes


def export_vae(vae, stats, resolution, folder):
    """Write a diffusers AutoencoderKL directory, whole or not at all. With latents_mean and latents_std in
    it, scaling_factor is 1: pipelines decode z * std / scaling_factor + mean. Raises UserError where `folder`
    is."""
    folder, cfg = Path(folder), dict(num_res_blocks=2, attn_levels=(), groups=32) | VAES[vae.name]
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    kinds = ["Attn" if i in cfg["attn_levels"] else "" for i in range(vae.levels)]
    config = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "act_fn": "silu",
              "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
              "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
              "block_out_channels": [cfg["ch"] * m for m in cfg["ch_mult"]],
              "layers_per_block": cfg["num_res_blocks"], "latent_channels": vae.latent_channels,
              "norm_num_groups": cfg["groups"], "sample_size": resolution,
              "scaling_factor": 1.0, "latents_mean": stats[0].tolist(), "latents_std": stats[1].tolist()}
    state = {diffusers_name(name, vae.levels): tensor for name, tensor in vae.state_dict().items()}
    state = {name: (tensor[..., 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor).contiguous()
             for name, tensor in state.items()}
    tmp = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        write_atomic(tmp / DIFFUSERS_FILE, lambda file: save_file(state, file, metadata={"format": "pt"}))
        write_atomic(tmp / "config.json", lambda file: file.write_text(json.dumps(config, indent=2) + "\n"))
        tmp.rename(folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def psnr(x, y):
    """Peak signal-to-noise ratio in dB, [B], of images in [-1, 1] (so of peak 2), clamped to that range."""
    mse = (x.clamp(-1, 1).float() - y.clamp(-1, 1).float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


def ssim(x, y):
    """Structural similarity [B] of images [B, C, H, W] in [-1, 1], averaged over channels and the positions
    where the Gaussian window (11 x 11, sigma 1.5) fits (Wang et al. 2004)."""
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5 ** 2))
    g, c = g / g.sum(), x.shape[1]
    kernel = torch.outer(g, g).expand(c, 1, 11, 11)
    blur = lambda z: F.conv2d(z, kernel, groups=c)
    x, y = (x.double() + 1) / 2, (y.double() + 1) / 2
    mx, my, c1, c2 = blur(x), blur(y), 0.01 ** 2, 0.03 ** 2
    vx, vy, cov = blur(x * x) - mx ** 2, blur(y * y) - my ** 2, blur(x * y) - mx * my
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))).mean((1, 2, 3))


# ------------------------------------------------------------------------------------------------------------
# The discriminator and the VAE's losses
# ------------------------------------------------------------------------------------------------------------

class Discriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): images [B, 3, H, W] -> logits [B, 1, h, w]. Its batch norm stays in train
    mode always, as in the release, and is not synchronised over processes."""

    def __init__(self, ch=64, layers=3):
        super().__init__()
        widths = [ch * 2 ** i for i in range(layers + 1)]
        main = [nn.Conv2d(3, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (cin, cout) in enumerate(zip(widths, widths[1:])):
            stride = 2 if i < layers - 1 else 1
            main += [nn.Conv2d(cin, cout, 4, stride=stride, padding=1, bias=False), nn.BatchNorm2d(cout),
                     nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*main, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for m in self.main:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, 0.02)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1, 0.02)

    def forward(self, x):
        return self.main(x)


def hinge_loss(real, fake):
    """Discriminator's loss on the logits of real and reconstructed images (spec: 0.5 * (relu(1-r) +
    relu(1+f)))."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def unit_channels(f, eps=1e-10):
    """Feature maps [B, C, h, w], each position scaled to unit length, in float32."""
    f = f.float()
    return f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + eps)      # its gradient at 0 is 0, not NaN


class LPIPS(nn.Module):
    """Learned perceptual distance (arXiv 1801.03924): VGG16 features, unit length per position, squared
    differences weighted by linear heads, averaged over positions, summed over five layers.

    heads: path of the linear heads' state dict (lin0.model.1.weight ...), the `lpips` package's own copy when
    None; vgg: path of torchvision's VGG16 weights, timm's hub copy when None. Raises UserError when either is
    not there.
    """
    LAYERS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}                  # relu1_2 ... relu5_3 -> channels

    def __init__(self, heads=None, vgg=None, random=False):
        super().__init__()
        if heads is None and not random:
            spec = importlib.util.find_spec("lpips")                     # found, not imported
            if spec is None:
                raise UserError("LPIPS: its linear heads are not here; pip install lpips, or give the file "
                                "by --lpips-ckpt, or take --perceptual encoder")
            heads = Path(spec.origin).parent / "weights/v0.1/vgg.pth"
        try:
            net = timm.create_model("vgg16.tv_in1k", pretrained=vgg is None and not random)
        except Exception as e:                                           # hub errors come in many classes
            raise UserError(f"LPIPS: VGG16 weights cannot be fetched ({type(e).__name__}); give "
                            "torchvision's vgg16 file by --vgg-ckpt, or take --perceptual encoder") from None
        self.features = net.features[:30]
        if vgg is not None:
            state = load_tensors(vgg)
            load_into(self.features, {k[9:]: v for k, v in state.items() if k.startswith("features.")}, vgg)
        self.heads = nn.ParameterList(torch.ones(c) / c for c in self.LAYERS.values())
        if heads is not None:
            state = load_tensors(heads)
            for i, head in enumerate(self.heads):
                weight = state.get(f"lin{i}.model.1.weight") if isinstance(state, dict) else None
                if weight is None or weight.numel() != head.numel():
                    raise UserError(f"{heads}: no LPIPS heads for VGG16 in it (lin{i}.model.1.weight)")
                head.data.copy_(weight.flatten())
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def levels(self, x):
        """Images [B, 3, H, W] in [-1, 1] -> the five unit-length feature maps. (The release scales its images
        to [-3, 1] first, a mistake fixed there later.)"""
        h, taps = (x - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.LAYERS:
                taps.append(unit_channels(h))
        return taps

    def forward(self, levels, target):
        """Distance [] (mean over the batch) of two results of `levels`; the target's is best made without
        graph."""
        return sum(((a - b).square() * head.view(1, -1, 1, 1)).sum(1).mean()
                   for a, b, head in zip(levels, target, self.heads))


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------

def export_command(args):
    vae, stats = load_vae(args.vae)
    if stats is None:
        raise UserError(f"{args.vae}: no latent statistics in it nor in NAME-latents-stats.pt beside it; "
                        "give a training checkpoint")
    export_vae(vae, stats, args.resolution, args.out)
    print(f"{args.out}: diffusers AutoencoderKL of {args.vae}, {vae.name}")


@torch.no_grad()
def reconstruct_command(args):
    vae, _ = load_vae(args.vae)
    vae.latent_size(args.resolution)
    device = pick_device(args.device)
    vae.to(device, memory_format=torch.channels_last).eval()
    files = [Path(args.images)] if Path(args.images).is_file() else list_images(args.images)
    try:
        lpips = LPIPS(args.lpips_ckpt, args.vgg_ckpt).to(device)
    except UserError as e:
        lpips = print(f"no LPIPS: {e}")
    shown, scores = [], []
    for file in tqdm(files, unit="img"):
        image = read_image(file, args.resolution)
        x = to_float(image[None]).to(device)
        y = to_uint8(vae.decode(vae.encode(x).mean))
        pair = [x.cpu(), to_float(y).cpu()]
        scores.append([psnr(*pair).item(), ssim(*pair).item()]
                      + ([lpips(lpips.levels(to_float(y)), lpips.levels(x)).item()] if lpips else []))
        if len(shown) < 48:
            shown += [image, y[0].cpu()]
    save_png(image_grid(torch.stack(shown), 8, max(1, 64 // args.resolution)), args.out)
    for name, value in zip(("PSNR (dB)", "SSIM", "LPIPS"), np.mean(scores, 0)):
        print(f"  {name:<12}{value:.4f}")
    print(f"{len(files)} images; originals beside reconstructions in {args.out}")


@torch.no_grad()
def latents_command(args):
    """A row of images, and for each VAE a row of their latents in colour; below, the variance of each
    principal component of the latents, as shares of the whole (over at most 256 images)."""
    files, device = list_images(args.images), pick_device(args.device)
    files = [files[i * len(files) // min(len(files), 256)] for i in range(min(len(files), 256))]
    images = torch.stack([read_image(file, args.resolution) for file in files])
    shown = list(range(0, len(files), -(-len(files) // 12)))
    rows, spectra, names = [images[shown]], {}, ["images"]
    for path in args.vaes:
        vae, _ = load_vae(path)
        vae.latent_size(args.resolution)
        vae.to(device, memory_format=torch.channels_last).eval()
        batches = tqdm(to_float(images).split(16), desc=path)
        z = torch.cat([vae.encode(x.to(device)).mean.cpu() for x in batches])
        _, variances, _ = principal_components(z)
        ckpt = Path(path)
        name = f"{ckpt.parent.parent.name} {ckpt.stem}" if ckpt.parent.name == "checkpoints" else ckpt.stem
        name = path if name in names else name
        rows.append(latents_in_colour(z, vae.stride)[shown])
        names.append(name)
        spectra[name] = range(1, len(variances) + 1), (variances / variances.sum()).clamp_min(1e-8).log10()
        dimensions = variances.sum() ** 2 / variances.square().sum()           # 1 to C
        print(f"{path}: variance {variances.mean():.4g}, {dimensions:.2f} effective dimensions of "
              f"{len(variances)}")
    scale = max(1, 64 // args.resolution)
    grid = image_grid(torch.cat(rows), len(shown), scale)
    picture, font = Image.new("RGB", (grid.width + 140, grid.height), "white"), ImageFont.load_default(13)
    picture.paste(grid, (140, 0))
    for k, name in enumerate(names):
        middle = (k + 0.5) * grid.height / len(names)
        ImageDraw.Draw(picture).text((132, middle), name, "black", font, anchor="rm")
    chart = line_chart(spectra, "share of the latents' variance by principal component, log10",
                       (picture.width, 320))
    save_png(Image.fromarray(np.vstack([picture, chart])), args.out)
    print(f"{len(files)} images -> {args.out}")


def main():
    parser = Parser(description="Export a VAE, or look at what it makes of images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="export|reconstruct|latents")
    export = commands.add_parser("export", help="write a diffusers AutoencoderKL directory")
    export.add_argument("vae", metavar="CKPT", help="a training checkpoint, ours or the release's")
    export.add_argument("out", metavar="DIR", help="a new folder")
    reconstruct = commands.add_parser("reconstruct", help="pictures, PSNR, SSIM, LPIPS of reconstructions")
    reconstruct.add_argument("vae", metavar="VAE", help="checkpoint, weights, diffusers folder or hub id")
    reconstruct.add_argument("images", metavar="IMAGES", help="a folder of images, or one")
    reconstruct.add_argument("--out", default="reconstructions.png")
    reconstruct.add_argument("--lpips-ckpt", help="LPIPS' linear heads, in place of the lpips package's")
    reconstruct.add_argument("--vgg-ckpt", help="torchvision's VGG16 weights, in place of the hub's")
    latents = commands.add_parser("latents", help="latents in colour side by side, and their spectra")
    latents.add_argument("images", metavar="IMAGES", help="a folder of images")
    latents.add_argument("vaes", metavar="VAE", nargs="+", help="checkpoints, weights, diffusers folders")
    latents.add_argument("--out", default="latents.png")
    for command in (export, reconstruct, latents):
        command.add_argument("--resolution", type=int, default=256, help="pixels (256)")
        if command is not export:
            command.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.resolution < 1:
        raise UserError(f"--resolution {args.resolution}: must be above 0")
    dict(export=export_command, reconstruct=reconstruct_command, latents=latents_command)[args.command](args)


if __name__ == "__main__":
    run_command(main)
