"""Memory layouts: which device takes which, and the VAE's forms for CUDA, computed on a CPU."""
import platform
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import vae
from conftest import close, run
from support import devices

LAST = torch.channels_last
CONVOLUTIONS = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default


@pytest.fixture
def as_on_cuda(monkeypatch):
    monkeypatch.setattr(vae, "on_cuda", lambda x: True)


class Record(TorchDispatchMode):
    """(operation, arguments) of all that runs inside."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def function_of(module):
    """f(x, *parameters)."""
    names = [name for name, _ in module.named_parameters()]
    return lambda x, *parameters: torch.func.functional_call(module,
                                                             dict(zip(names, parameters, strict=True)), x)


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


# --- The VAE's forms for CUDA -------------------------------------------------------------------------------

@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("image", ["noise", "constant"])
def test_group_norm_for_cuda_is_group_norm(groups, image, as_on_cuda):
    torch.manual_seed(0)
    norm = vae.GroupNorm(groups, 64, eps=1e-6).double()
    x = torch.randn(3, 64, 5, 7).double() * 3 + 2 if image == "noise" else torch.full((3, 64, 5, 7),
                                                                                      0.5).double()
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


@pytest.mark.parametrize("channels, size, products", [(288, 4, True), (256, 4, False), (288, 65, False)])
def test_attention_for_cuda_is_by_products_where_heads_are_wide(channels, size, products, as_on_cuda):
    """Up to 4,096 positions."""
    with FakeTensorMode():
        block, x = vae.AttnBlock(channels, 32), torch.empty(1, channels, size, size)
        with Record() as record:
            block(x.contiguous(memory_format=LAST))
    assert products != any("scaled_dot_product" in str(func) for func, _ in record.calls)


def test_attention_by_products_is_attention(monkeypatch):
    torch.manual_seed(0)
    block, x = vae.AttnBlock(288, 32).double(), torch.randn(2, 288, 3, 5).double()

    def attend(on_cuda):
        def call(*tensors):
            monkeypatch.setattr(vae, "on_cuda", lambda x: on_cuda)
            return function_of(block)(*tensors)
        return call
    compare(attend(True), attend(False), x, *block.parameters())


@pytest.mark.parametrize("part, attention", [("encoder", 2), ("decoder", 3)])
def test_convolutions_on_cuda_get_channels_last(part, attention, as_on_cuda):
    """In the forward and the backward pass: traced on a CPU, then run on fake CUDA tensors, where PyTorch's
    own group norm would return NCHW. The exception is one gradient of each attention, that of k, which
    PyTorch's product writes transposed."""
    config = dict(ch=32, ch_mult=(1, 9), num_res_blocks=1, attn_levels=(1,), latent_channels=4)
    with FakeTensorMode():
        net = getattr(vae.AutoencoderKL(config), part)
        x = torch.empty(2, 3, 32, 32) if part == "encoder" else torch.empty(2, 4, 16, 16)
        tensors = [t.detach().contiguous(memory_format=LAST if t.ndim == 4 else torch.contiguous_format)
                   for t in (x, *net.parameters())]

        def gradients(x, *p):
            y = function_of(net)(x, *p)
            return torch.autograd.grad(y, (x, *p), torch.ones_like(y))
        graph = make_fx(gradients)(*[t.requires_grad_() for t in tensors])
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = node.kwargs | dict(device=torch.device("cuda"))
        graph.recompile()
        with Record() as record, torch.no_grad():
            graph(*[t.to("cuda") for t in tensors])
        images = [t for func, args in record.calls if func in CONVOLUTIONS
                  for t in args if isinstance(t, torch.Tensor) and t.ndim == 4]
        wrong = [t.shape for t in images if not t.is_contiguous(memory_format=LAST)]
        assert len(images) > 50 and all(t.is_cuda for t in images)
        assert wrong == [(2, 288, 16, 16)] * attention


# --- By the hardware ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("machine, capability, device, last", [
    ("x86_64", "AVX512", "cpu", True), ("AMD64", "AVX2", "cpu", False), ("x86_64", "DEFAULT", "cpu", False),
    ("aarch64", "DEFAULT", "cpu", True), ("arm64", "SVE256", "cpu", True), ("x86_64", "AVX2", "cuda", True),
    ("arm64", "DEFAULT", "mps", False)])
def test_memory_format_by_the_hardware(machine, capability, device, last, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert devices.memory_format(device) == (LAST if last else torch.contiguous_format)


@pytest.mark.skipif(not devices.is_x86(), reason="x86's instructions")
def test_memory_format_obeys_restricted_instructions(tmp_path):
    code = "from support.devices import memory_format; print(memory_format('cpu'))"
    out = run(sys.executable, "-c", code, cwd=tmp_path, env=dict(ATEN_CPU_CAPABILITY="avx2"))
    assert "contiguous_format" in out
