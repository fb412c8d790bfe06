"""Memory layouts: which device takes which, and the VAE's forms for CUDA, computed on a CPU."""
import platform

import pytest
import torch
import torch.nn.functional as F

import vae
from conftest import close
from support import devices

LAST = torch.channels_last

@pytest.fixture
def as_on_cuda(monkeypatch):
    monkeypatch.setattr(vae, "on_cuda", lambda x: True)


def function_of(module):
    """f(x, *parameters)."""
    names = [name for name, _ in module.named_parameters()]
    return lambda x, *parameters: torch.func.functional_call(module, dict(zip(names, parameters)), x)


def compare(ours, theirs, *inputs):
    """Values and gradients of two functions, of a random sum of their outputs."""
    results = []
    for function in (ours, theirs):
        copies = [t.detach().clone().requires_grad_() for t in inputs]
        y = function(*copies)
        g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        results.append([y.detach(), *torch.autograd.grad(y, copies, g.contiguous(memory_format=LAST))])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max().clamp_min(1)
    return results[0]


# --- The VAE's forms for CUDA -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("image", ["noise", "constant"])
def test_group_norm_for_cuda_is_group_norm(groups, image, as_on_cuda):
    torch.manual_seed(0)
    norm = vae.GroupNorm(groups, 64, eps=1e-6).double()
    x = torch.randn(3, 64, 5, 7).double() * 3 + 2 if image == "noise" else torch.full((3, 64, 5, 7), 0.5).double()
    y, grad = compare(function_of(norm), lambda x, *p: F.group_norm(x, groups, *p, eps=1e-6),
                      x.contiguous(memory_format=LAST), torch.rand(64).double(), torch.randn(64).double())[:2]
    assert y.is_contiguous(memory_format=LAST) and grad.is_contiguous(memory_format=LAST)


def test_group_norm_for_cuda_is_float32_under_bf16(as_on_cuda):
    norm, x = vae.GroupNorm(2, 4), torch.randn(2, 4, 64, 64).bfloat16()
    y = norm(x)
    assert y.dtype == torch.float32
    close(y.detach(), F.group_norm(x.float(), 2), 1e-5)


def test_upsampling_for_cuda_is_upsampling_and_convolution(as_on_cuda):
    torch.manual_seed(0)
    layer = vae.Upsample(6).double()
    compare(function_of(layer), lambda x, *p: F.conv2d(F.interpolate(x, scale_factor=2.0), *p, padding=1),
            torch.randn(2, 6, 5, 3).double(), layer.conv.weight, layer.conv.bias)


def test_attention_by_products_is_attention(monkeypatch):
    torch.manual_seed(0)
    block, x = vae.AttnBlock(288, 32).double(), torch.randn(2, 288, 3, 5).double()

    def attend(on_cuda):
        def call(*tensors):
            monkeypatch.setattr(vae, "on_cuda", lambda x: on_cuda)
            return function_of(block)(*tensors)
        return call
    compare(attend(True), attend(False), x, *block.parameters())


# --- By the hardware --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("machine, capability, device, last", [
    ("x86_64", "AVX512", "cpu", True), ("AMD64", "AVX2", "cpu", False), ("x86_64", "DEFAULT", "cpu", False),
    ("aarch64", "DEFAULT", "cpu", True), ("arm64", "SVE256", "cpu", True), ("x86_64", "AVX2", "cuda", True),
    ("arm64", "DEFAULT", "mps", False)])
def test_memory_format_by_the_hardware(machine, capability, device, last, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert devices.memory_format(device) == (LAST if last else torch.contiguous_format)
