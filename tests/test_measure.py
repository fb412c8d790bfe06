"""benchmarks/gpu.sh, measure.py, parts.py and release.py: what is timed, logged and skipped; all at toy
size."""
import os
import sys
import time
from pathlib import Path
from shutil import which
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
import vae
from benchmarks import measure, parts
from benchmarks.memory import random_batch, read_flags
from conftest import CPU, ROOT, one_line, run, slow
from support.metrics import read_rows

TINY = ["--resolution", "32", "--preset", "tiny"]
ENDLESS = 10 ** 12                                                # images: more than any memory holds


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys):
    """measured(what, *flags): measure.py in this process; the rows of its file, or the lines of the
    tables."""
    file = tmp_path / "results.jsonl"
    switches = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32"),
                (torch.backends.cudnn, "benchmark"), (torch.backends.cudnn, "benchmark_limit"),
                (torch._inductor.config, "max_autotune"), (vae, "on_cuda")]
    before = [getattr(owner, name) for owner, name in switches]

    def call(what, *flags):
        monkeypatch.setattr(sys, "argv", ["measure.py", what, str(file), *map(str, flags)])
        capsys.readouterr()
        measure.main()
        return capsys.readouterr().out.splitlines() if what == "tables" else read_rows(file)

    yield call
    for (owner, name), value in zip(switches, before, strict=True):
        setattr(owner, name, value)


def test_steps_are_timed_after_the_third(measured, monkeypatch):
    """Steps of known length: the first as if it compiles, two that are still slow, then the steps that count;
    two more for the kernels. Compiled, they begin with the most images that fit eagerly."""
    seen = []

    def known_step(m, cfg, k, batch, rank, world):
        seen.append((len(batch[0]), k))
        time.sleep({0: 0.6, 1: 0.4, 2: 0.4}.get(k, 0.05))

    monkeypatch.setattr(train, "run_step", known_step)
    monkeypatch.setattr(measure, "can_compile", lambda *_: True)
    rows = measured("steps", *TINY, "--images", 2, "--most", 4, "--steps", 2, "--compile")
    # first one to count FLOPs
    assert seen == [(1, 0), *((n, k) for n in (2, 4, 4) for k in (0, 1, 2, 3, 4, 0, 1))]
    assert [(row["images"], row["compiled"]) for row in rows] == [(2, False), (4, False), (4, True)]
    for row in rows:
        assert 50 <= row["step_ms"] < 150 and 0.6 <= row["first_step_s"] < 0.9
        assert row["images_per_second"] == pytest.approx(1e3 * row["images"] / row["step_ms"])


def test_flops_are_those_of_a_step(measured):
    flags = [*TINY, "--vae-grad", "none", "--cache-latents"]
    row, = measured("steps", *flags, "--images", 2, "--most", 2, "--steps", 1)
    cfg = read_flags([*flags, "--batch-size", "2"], 1)
    m = train.build(cfg, CPU)
    batch = random_batch(m, cfg, 2)
    assert len(batch) == 4 and batch[0].float().std() > 50                                # not all black
    with FlopCounterMode(display=False) as counter:
        train.run_step(m, cfg, 0, batch, 0, 1)
    tflops = counter.get_total_flops() / row["step_ms"] / 1e9
    assert row["share_of_peak"] * row["peak_tflops"] == pytest.approx(tflops)
    kinds = [row[kind] for kind in ("products_ms", "convolutions_ms", "other_ms")]
    assert min(kinds) > 0


@pytest.mark.parametrize("kind, names", [
    ("copies_ms",
     ["void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, float>", "cudnn::ops::nhwcAddPaddingKernel<float>",
                   "at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(at::TensorIterator&)>"]),
    ("attention_ms", ["cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31_64x64",
                      "fmha_cutlassB_bf16_aligned_64x64_k65536_sm80(AttentionBackwardKernel::Params)"]),
    ("triton_ms", ["triton_red_fused_convolution_native_group_norm_3", "triton_poi_fused__to_copy_7"]),
    ("convolutions_ms",
     ["sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_cudnn",
                         "cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x256>"]),
    ("products_ms",
     ["nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_nn"]),
    ("optimizers_ms", ["at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor<float, 4>>"]),
    ("other_ms", ["void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor<float>>"])])
def test_kinds_of_kernels(kind, names, monkeypatch):
    """By names that CUDA's kernels have, 3 ms of each in two steps."""
    class Profiler(list):
        def __init__(self, activities):
            super().__init__(SimpleNamespace(key=name, self_cpu_time_total=3000) for name in names)

        __enter__ = key_averages = lambda self: self
        __exit__ = table = lambda self, *_, **__: None

    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    row = measure.measure_step(lambda k: None, 1)
    assert {name: ms for name,
            ms in row.items() if name not in ("first_step_s", "step_ms", "gpu_memory_gib")} == {
        kind: 1.5 * len(names)}


def test_out_of_memory_is_logged(measured):
    row, = measured("steps", *TINY, "--images", ENDLESS, "--most", 2 * ENDLESS)
    assert "memory" in row["ended"] and "step_ms" not in row
    assert any(f"| {ENDLESS} | out of memory" in line for line in measured("tables"))


def test_layers_of_the_vae_are_measured_in_their_forms(measured, monkeypatch):
    """tiny's decoder: 128 channels at 8 pixels, 64 at 16, 32 at 32."""
    def measure_layer(layer, shape, cfg, m):
        return dict(is_cuda=vae.on_cuda(None), forced=torch._inductor.config.force_layout_optimization,
                    channels=[
            layer.conv.in_channels if isinstance(layer, vae.Upsample) else next(layer.parameters()).shape[0]])

    monkeypatch.setattr(parts, "measure_layer", measure_layer)
    rows = measured("parts", *TINY, "--vae-only", "--images", 3)
    forms = [("plain", False, False), ("plain, forced layout", False, True), ("for CUDA", True, False)]
    sizes = [[32, 32], [64, 16], [128, 8]]
    layers = [("ResnetBlock", sizes[0]), ("Upsample", sizes[1]), ("Upsample", sizes[2]),
              ("AttnBlock", sizes[2])]
    expected = [("Conv2d", size, *forms[0]) for size in sizes]
    expected += [(*layer, *form) for layer in layers for form in forms]
    assert [(row["layer"], [*row["channels"], row["input"][2]], row["form"], row["is_cuda"], row["forced"])
            for row in rows] == expected
    assert all(row["input"][0] == 3 and row["input"][2] == row["input"][3] for row in rows)


def test_a_layer_is_timed_forward_and_backward():
    cfg = read_flags([*TINY, "--vae-only", "--mixed-precision", "no"], 1)
    m, passes = train.build(cfg, CPU), []
    conv = torch.nn.Conv2d(8, 16, 3, padding=1)
    conv.register_forward_hook(lambda *_: time.sleep(0.01))
    conv.weight.register_hook(lambda gradient: passes.append(gradient.shape))
    row = parts.measure_layer(conv, (2, 8, 32, 32), cfg, m)
    assert 10 < row["ms"] < 100 and len(passes) == 13 and 0 < row["copies_ms"] < 10
    flops = 3 * 2 * 2 * 16 * 32 * 32 * 8 * 9
    assert row["tflops"] == pytest.approx(flops / row["ms"] / 1e9)


def test_variants(measured, monkeypatch):
    monkeypatch.setattr(measure, "parts", lambda args, cfg, m: [dict(
        on_cuda=vae.on_cuda(SimpleNamespace(is_cuda=True)), plans=torch.backends.cudnn.benchmark_limit,
        autotune=torch._inductor.config.max_autotune)])
    rows = [measured("parts", *TINY, *flags)[-1] for flags in (
        [], ["--variant", "plans"], ["--variant", "autotune"], ["--variant", "plain"])]
    assert [(row["on_cuda"], row["plans"] == 0, row["autotune"], row["variant"]) for row in rows] == [
        (True, False, False, ""), (True, True, False, "plans"), (True, True, True, "autotune"),
        (False, True, False, "plain")]                          # what is tried stays: one variant per process


def test_sampling_is_timed_after_a_warm_up(measured, monkeypatch):
    calls = []

    def known_samples(model, indices, labels, **settings):
        calls.append((len(indices), settings["cfg_scale"], settings["num_steps"]))
        time.sleep(0.1 if len(calls) % 2 == 0 else 0.6)

    monkeypatch.setattr(measure, "sample_images", known_samples)
    rows = measured("sampling", *TINY, "--vae-grad", "none", "--proj-coeff", 0, "--images", 3, "--steps", 5)
    assert calls == [(3, 1, 5)] * 2 + [(3, 2, 5)] * 2 and all(15 < row["images_per_second"] <= 30
                                                              for row in rows)


def test_tables_show_all_rows(capsys):
    measure.print_tables([dict(measured="steps", images=8, ended="no"),
                          dict(measured="section", outcome="done"),
                          dict(measured="steps", images=4, step_ms=123.456)])
    assert capsys.readouterr().out.splitlines() == [
        "", "| measured | images | ended | step_ms |", "|---|---|---|---|", "| steps | 8 | no |  |",
        "| steps | 4 |  | 123.5 |", "", "| measured | outcome |", "|---|---|", "| section | done |"]


def test_the_authors_code_is_missing(tmp_path):
    out = run(sys.executable, ROOT / "benchmarks/measure.py", "release", "x.jsonl", *TINY, "--images", 2,
              "--release",
              "nowhere", cwd=tmp_path, code=2)
    one_line(out, "--release nowhere", "pip install accelerate einops")


@pytest.mark.skipif(not which("timeout"), reason="gpu.sh needs GNU coreutils' timeout")
@slow
def test_gpu_sh_at_toy_size(tmp_path):
    """Each section is measured; one that fails is logged and the next begins; what is done is skipped. The
    authors' step is measured where the environment variable RELEASE names a folder with their code."""
    out = tmp_path / "out"
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TOY": "1", "OUT": str(out),
           "MODELS": "SiT-T/2 SiT-Q/2"}

    def start(code=0, **settings):
        printed = run("bash", ROOT / "benchmarks/gpu.sh", cwd=tmp_path, env=env | settings, code=code)
        return printed, read_rows(out / "results.jsonl")

    _, rows = start(TOTAL="0")
    assert rows and {row["outcome"]
                     for row in rows} == {"no time was left"} and not any((out / "done").iterdir())
    printed, rows = start()
    outcomes = {row["section"]: row["outcome"] for row in rows if "section" in row}
    bad = [name for name in outcomes if "SiT-Q-2" in name]
    assert len(bad) == 2 and all("--model SiT-Q/2: unknown" in outcomes.pop(name) for name in bad)
    assert "passed" in outcomes["tests"] or "skipped" in outcomes.pop("tests")
    assert set(outcomes.values()) == {"done"}, outcomes
    assert ("release" in outcomes) == bool(os.environ.get("RELEASE"))
    assert list(outcomes)[:4] == ["parts", "changes-plain", "changes-ours", "changes-plans"]
    steps = [(row["variant"], row["images"], "none" in row["flags"]) for row in rows
             if row["measured"] == "steps"]
    assert steps == [("plain", 2, False), ("", 2, False), ("plans", 2, False), ("", 2, True), ("", 4, True),
                     ("autotune", 4, True), ("", 2, False), ("", 4, False), ("", 2, True), ("", 4, True)]
    assert all(row["images_per_second"] > 0 for row in rows if row["measured"] == "sampling")
    assert all(row["step_ms"] > 0 for row in rows if row["measured"] == "release")
    assert printed.endswith((out / "tables.md").read_text())

    _, again = start()
    assert {row["section"] for row in again[len(rows):]} == set(bad)
    one_line(start(2, RESOLUTION="64")[0], "has other settings")


def test_an_empty_table_is_one_line(tmp_path):
    out = run(sys.executable, ROOT / "benchmarks/measure.py", "tables", "nothing.jsonl", cwd=tmp_path, code=2)
    one_line(out, "nothing.jsonl", "gpu.sh")
