"""grids.py: images as numbers for networks, and grids of images for people.

Images are uint8 [B, 3, H, W] in files and grids, float32 [B, 3, H, W] in [-1, 1] for networks.
"""
import torch
import torch.nn.functional as F
from PIL import Image

from support.files import write_atomic


def to_float(images):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float().div(127.5).sub(1)


def to_uint8(images):
    """Float [-1, 1] -> uint8, rounded (the release truncates, which darkens by half a level)."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def image_grid(images, columns, scale=1):
    """Tile uint8 images [N, 3, H, W] row by row into one PIL image, 2 white pixels apart, then enlarge it."""
    missing = -len(images) % columns                                           # white ones fill the last row
    tiles = F.pad(images.cpu(), (0, 2, 0, 2, 0, 0, 0, missing), value=255)
    tiles = tiles.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)           # [rows, h, columns, w, 3]
    grid = Image.fromarray(tiles.flatten(2, 3).flatten(0, 1)[:-2, :-2].numpy())
    return grid.resize((grid.width * scale, grid.height * scale), Image.NEAREST)


def save_png(image, path):
    """Write a PIL image as PNG, atomically."""
    write_atomic(path, lambda tmp: image.save(tmp, format="PNG", optimize=True))


def save_reconstructions(images, reconstructions, rgb, path):
    """Write a grid of 24 triples: image (uint8 [N, 3, R, R]), reconstruction (float [N, 3, R, R] in [-1, 1]),
    PCA of the latent (uint8 [N, 3, R, R], see `pca_rgb`); small images enlarged to 64 pixels."""
    triples = torch.stack([images[:24], to_uint8(reconstructions[:24]), rgb[:24]], 1).flatten(0, 1)
    save_png(image_grid(triples, columns=12, scale=max(1, 64 // images.shape[2])), path)


def pca_rgb(z, stride=1):
    """The first three principal components of latents [B, C, h, w], uint8 RGB [B, 3, h*stride, w*stride].
    Where C < 3, the missing components are zero (grey 128)."""
    x = z.float().permute(0, 2, 3, 1).flatten(0, 2)                            # [B*h*w, C]
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x / len(x))[1].flip(1)[:, :3]               # largest variance first
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()    # largest loading positive
    x = F.pad(x @ axes, (0, 3 - axes.shape[1]))
    x = x / (2.5 * x.std(0, correction=0) + 1e-6)                              # +-2.5 sigma fills the range
    rgb = to_uint8(x.unflatten(0, (z.shape[0], *z.shape[2:])).permute(0, 3, 1, 2))
    return rgb.repeat_interleave(stride, 2).repeat_interleave(stride, 3)
