"""The autoencoder, its discriminator, losses and metrics, compared with independent code."""
import math

import pytest
import torch
import torch.nn as nn
from scipy.ndimage import gaussian_filter

import repa
import vae
from conftest import close, digest, nchw, needs, smooth_images
from support.commands import UserError


def test_state_dicts_are_the_released_ones():
    """Digests of the sorted lines 'name shape' of the released checkpoints."""
    with torch.device("meta"):
        assert digest(vae.AutoencoderKL("f8d4")) == (248, "50f3b11a29b71571")
        assert digest(vae.AutoencoderKL("f16d32")) == (342, "5be5c896fe9232de")
        assert digest(vae.Discriminator()) == (22, "df0b62c8c55bdab0")


def test_reconstruct_returns_means_and_their_decodings():
    torch.manual_seed(0)
    net, images = vae.AutoencoderKL("f4d8"), torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    means, reconstructions = vae.reconstruct(net, images, batch_size=2)
    mean = net.encode(images / 127.5 - 1).moments[:, :8].detach()
    close(means, mean, 1e-4)
    close(reconstructions, net.decode(mean).detach(), 1e-4)
    assert not means.requires_grad and not reconstructions.requires_grad


def test_fixed_posterior_std_without_quant_conv():
    torch.manual_seed(0)
    net, x = vae.AutoencoderKL(vae.VAES["f4d8"] | dict(quant_conv=False)), torch.rand(2, 3, 16, 16)
    net.fix_posterior_std(0.3)
    net.encode(x).sample(torch.randn(2, 8, 4, 4)).square().sum().backward()
    for p in net.encoder.conv_out.parameters():
        assert p.grad[:8].any() and not p.grad[8:].any()             # the mean trains
    loaded = vae.AutoencoderKL(net.config)                                 # a file needs nothing more
    loaded.load_state_dict(net.state_dict())
    close((0.5 * loaded.encode(x).logvar).exp().detach(), torch.full((2, 8, 4, 4), 0.3), 1e-6)


def test_discriminator_initialization():
    torch.manual_seed(0)
    for module in vae.Discriminator().main:
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        elif isinstance(module, nn.BatchNorm2d):
            assert abs(module.weight.mean() - 1) < 0.01 and module.weight.std().item() == pytest.approx(0.02,
                                                                                                        rel=0.3)


def test_smallest_image_of_the_discriminator():
    disc, size = vae.Discriminator(), vae.Discriminator.MIN_SIZE
    assert disc(torch.zeros(1, 3, size, size)).numel() > 0
    with pytest.raises((RuntimeError, ValueError)):
        disc(torch.zeros(1, 3, size - 1, size - 1))


@needs("lpips")
def test_lpips_equals_the_package(tmp_path):
    import lpips
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    layers = [layer for i in range(1, 6) for layer in getattr(theirs.net, f"slice{i}")]
    state = nn.ModuleDict({"features": nn.ModuleList(layers)}).state_dict()
    torch.save(state | {"classifier.0.weight": torch.ones(2)}, tmp_path / "vgg.pth")
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    x.requires_grad_()
    random_state = torch.get_rng_state()
    ours = vae.LPIPS(vgg=tmp_path / "vgg.pth")
    assert torch.equal(torch.get_rng_state(), random_state)     # the file's weights are not initialized first
    distances = ours(x, y), theirs(x, y).mean()
    assert distances[0].item() == pytest.approx(distances[1].item(), rel=1e-5)
    ours_x, theirs_x = (torch.autograd.grad(distance, x)[0] for distance in distances)
    assert (ours_x - theirs_x).norm() < 1e-3 * theirs_x.norm()


def test_lpips_is_compiled_as_one_graph(tiny):
    """With --gradient-checkpointing, too; distance and gradient stay those of the eager one."""
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    x.requires_grad_()
    m, _, _ = tiny("--perceptual", "lpips", "--allow-random-weights", "--compile", "--gradient-checkpointing")
    graphs, results = [], []
    for stance in (dict(stance="force_eager"),
                   dict(force_backend=lambda g, args: graphs.append(g) or g.forward)):
        with torch.compiler.set_stance(**stance):
            distance = m.perceptual(x, y)
        results.append([distance.item(), *torch.autograd.grad(distance, x)[0].flatten().tolist()])
    close(results[1], results[0], 1e-5)
    assert len(graphs) == 1


def test_perceptual_features_are_float32_of_unit_length_under_bf16():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    for distance in (vae.LPIPS(random=True), repa.EncoderDistance()):
        exact = distance.features(x)
        with torch.autocast("cpu", torch.bfloat16):
            maps = distance.features(x)
        for f, g in zip(maps, exact, strict=True):
            lengths = f.norm(dim=1)
            assert f.dtype == torch.float32 and ((lengths - 1).abs() < 1e-5).logical_or(lengths == 0).all()
            assert not torch.equal(f, g)                                              # the layers ran in bf16


def test_ssim_equals_gaussian_filters():
    a, b = smooth_images(2, 40, 1) / 255, smooth_images(2, 40, 2) / 255

    def blur(z):
        return gaussian_filter(z, (0, 1.5, 1.5, 0), truncate=3.5)[:, 5:-5, 5:-5]
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    top, bottom = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4), (ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)
    close(vae.ssim(nchw(a * 2 - 1), nchw(b * 2 - 1)), (top / bottom).mean((1, 2, 3)), 1e-9)
    with pytest.raises(UserError, match="at least 11 x 11 pixels, not 10 x 12"):
        vae.ssim(torch.zeros(1, 3, 10, 12), torch.zeros(1, 3, 10, 12))


def test_psnr_in_closed_form():
    """Peak 2; values beyond [-1, 1] are clamped; one number per image."""
    x, y = (torch.tensor(values).view(2, 1, 1, 1).expand(2, 3, 4, 4) for values in ([0, -9.0], [0.1, 3]))
    assert vae.psnr(x, y).tolist() == pytest.approx([20 * math.log10(2 / 0.1), 0], abs=1e-4)
