"""The autoencoder, its discriminator, losses and measures, against independent code."""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch._subclasses.fake_tensor import FakeTensorMode

import repa
import vae
from conftest import digest, needs, smooth_pictures
from support.commands import UserError


def test_state_dicts_are_the_released_ones():
    """Digests of the sorted lines 'name shape' of the released checkpoints."""
    with torch.device("meta"):
        assert digest(vae.AutoencoderKL("f8d4")) == (248, "50f3b11a29b71571")
        assert digest(vae.AutoencoderKL("f16d32")) == (342, "5be5c896fe9232de")
        assert digest(vae.Discriminator()) == (22, "df0b62c8c55bdab0")


def test_initialisation_of_the_discriminator():
    torch.manual_seed(0)
    for module in vae.Discriminator().main:
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        elif isinstance(module, nn.BatchNorm2d):
            assert abs(module.weight.mean() - 1) < 0.01 and module.weight.std().item() == pytest.approx(0.02, rel=0.3)


@needs("lpips")
def test_lpips_is_the_package(tmp_path):
    import lpips
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    layers = [layer for i in range(1, 6) for layer in getattr(theirs.net, f"slice{i}")]
    state = nn.ModuleDict({"features": nn.ModuleList(layers)}).state_dict()
    torch.save(state, tmp_path / "vgg.pth")
    ours = vae.LPIPS(vgg=tmp_path / "vgg.pth")
    x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    x.requires_grad_()
    distance, expected = ours(x, y), theirs(x, y).mean()
    assert distance.item() == pytest.approx(expected.item(), rel=1e-5)
    ours_x, = torch.autograd.grad(distance, x)
    theirs_x, = torch.autograd.grad(expected, x)
    assert (ours_x - theirs_x).norm() < 1e-3 * theirs_x.norm()


def test_unit_length_features_are_float32_under_bf16():
    """Of both perceptual distances: off by less than bf16 could show, though their layers ran in bf16."""
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for distance in (vae.LPIPS(random=True), repa.EncoderDistance()):
        plain = distance.features(x)
        with torch.autocast("cpu", torch.bfloat16):
            maps = distance.features(x)
        for f, exact in zip(maps, plain, strict=True):
            lengths = f.norm(dim=1)
            assert f.dtype == torch.float32 and ((lengths - 1).abs() < 1e-5).logical_or(lengths == 0).all()
            assert not torch.equal(f, exact)


def test_lpips_written_out(tmp_path):
    """Over torchvision's VGG16: images scaled once, five layers, unit length, heads, mean over positions and batch."""
    torch.manual_seed(0)
    net = torchvision.models.vgg16(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "vgg.pth")
    heads = [torch.rand(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]
    torch.save({f"lin{k}.model.1.weight": head for k, head in enumerate(heads)}, tmp_path / "heads.pth")
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((-0.03, -0.088, -0.188), (0.458, 0.448, 0.45)))
    h, g, expected, heads = (x - mean) / std, (y - mean) / std, 0.0, iter(heads)
    with torch.no_grad():
        for k, layer in enumerate(net.features):
            h, g = layer(h), layer(g)
            if k in (3, 8, 15, 22, 29):
                a, b = (f / f.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10) for f in (h, g))
                expected += ((a - b) ** 2 * next(heads)).sum(1).mean((1, 2))                 # [2]
    distance = vae.LPIPS(tmp_path / "heads.pth", tmp_path / "vgg.pth")(x, y)
    assert distance.item() == pytest.approx(expected.mean().item(), rel=1e-4)


def test_ssim_against_gaussian_filter():
    x, y = smooth_pictures(2, 40, 1) / 255, smooth_pictures(2, 40, 2) / 255
    for n in range(2):
        values = []
        for c in range(3):
            def blur(z):
                return gaussian_filter(z, 1.5, truncate=3.5)[5:-5, 5:-5]
            a, b = x[n, ..., c], y[n, ..., c]
            ma, mb = blur(a), blur(b)
            va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
            top, bottom = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4), (ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)
            values.append((top / bottom).mean())
        ours = vae.ssim(*(torch.from_numpy(z[n:n + 1] * 2 - 1).permute(0, 3, 1, 2) for z in (x, y)))
        assert ours.item() == pytest.approx(np.mean(values), abs=1e-9)


def test_ssim_where_the_images_are():
    """On the tensors' own device (of tensors without values), on the CPU for MPS, which has no float64; images
    smaller than the window are refused."""
    for device, result in (("cuda", "cuda"), ("mps", "cpu"), ("cpu", "cpu")):
        with FakeTensorMode():
            x = torch.zeros(2, 3, 11, 12, device=device)
            assert vae.ssim(x, x).device.type == result and vae.ssim(x, x).shape == (2,)
    for shape in ((1, 3, 10, 32), (1, 3, 32, 10)):
        with pytest.raises(UserError, match=f"at least 11 x 11 pixels, not {shape[2]} x {shape[3]}"):
            vae.ssim(torch.zeros(shape), torch.zeros(shape))


def test_smallest_image_of_the_discriminator():
    disc = vae.Discriminator()
    for size in range(4, 48):
        if size >= disc.MIN_SIZE:
            assert disc(torch.zeros(1, 3, size, size)).numel() > 0
        else:
            with pytest.raises((RuntimeError, ValueError)):
                disc(torch.zeros(1, 3, size, size))


def test_psnr_in_closed_form():
    """Peak 2; values beyond [-1, 1] count as those ends; one number an image."""
    x, y = torch.zeros(2, 3, 4, 4), torch.tensor([0.1, 3.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert vae.psnr(x, y).tolist() == pytest.approx([20 * math.log10(2 / 0.1), 20 * math.log10(2)], rel=1e-5)


def test_chroma_error_is_that_of_pillows_ycbcr():
    """Against Pillow's conversion of colours constant over blocks of 4 x 4 pixels (it rounds to levels); what
    only moves pixels about within a block is no error."""
    colours = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    images = colours.repeat(4, 2).repeat(4, 3)                                          # [2, 3, 32, 32, 3]
    chroma = [[np.asarray(Image.fromarray(image).convert("YCbCr"), float)[..., 1:] for image in half]
              for half in images]
    expected = np.abs(np.subtract(*chroma)).mean((1, 2, 3))
    x, y = torch.from_numpy(images).permute(0, 1, 4, 2, 3) / 127.5 - 1
    assert vae.chroma_error(x, y).numpy() == pytest.approx(expected, abs=0.3)
    noise = 0.5 * torch.rand(1, 3, 4, 4)
    assert vae.chroma_error(noise, noise.flip(2, 3)).item() < 1e-4 < vae.chroma_error(noise, noise.flip(1)).item()
