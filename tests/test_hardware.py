"""Machines that differ: precision, Macs, compilers; gradients are sent once."""
import shutil
import sys
import timeit

import pytest
import torch
import torch.distributed as dist

import repa
import train
from conftest import CPU, SHORT, run, tiny_config
from support import devices

MPS = torch.device("mps")


# --- Precision ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fast, chosen", [(torch.float32, "no"), (torch.bfloat16, "bf16")])
def test_auto_precision_is_bf16_where_it_is_faster(fast, chosen, monkeypatch):
    """With a clock by which a product in the other precision takes twice as long."""
    monkeypatch.setattr(timeit, "repeat", lambda product, **_: [1 + (product().dtype != fast)])
    assert devices.choose_precision("auto", CPU, devices.Processes()) == chosen
    assert devices.choose_precision("auto", MPS, devices.Processes()) == "no"


@pytest.mark.skipif(not devices.is_x86(), reason="x86's instructions")
def test_precision_where_bf16_is_emulated(tmp_path):
    code = ("import torch; from support import devices\n"
            "for asked in ('auto', 'bf16', 'no'):\n"
            "    print(devices.choose_precision(asked, torch.device('cpu'), devices.Processes()))")
    out = run(sys.executable, "-c", code, cwd=tmp_path,
              env=dict(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2"))
    assert out.splitlines() == ["precision: float32 (bf16 is not faster here)", "no",
                                "warning: bf16 is not faster here than --mixed-precision no", "bf16", "no"]


def test_commands_use_the_chosen_precision(image_dir, command):
    flags = ["--data-dir", image_dir, *SHORT, "--max-train-steps"]
    command("train", *flags, "1")
    out = command("train", *flags, "2", "--resume", "--mixed-precision", "bf16")
    assert "resuming with a changed mixed_precision: no -> bf16" in out
    sampling = ["--num-samples", "4", "--num-steps", "1", "--device", "cpu", "--mixed-precision", "auto"]
    assert "precision: " in command("sample", *sampling)
    assert "precision: " in command("fid", *sampling, "--features", repa.LITE2, "--num-workers", "0")


# --- Wrong kernels, Macs, compilers -------------------------------------------------------------------------

def test_cudnn_attention_is_off_where_its_gradients_are_wrong():
    def stays_on(*tokens):
        torch.backends.cuda.enable_cudnn_sdp(True)
        devices.disable_wrong_attention(*tokens)
        return torch.backends.cuda.cudnn_sdp_enabled()

    try:
        assert not stays_on(192) and not stays_on(256, 64) and stays_on(1024, 256)
        for resolution in ("32", "64"):                      # 64 positions of the VAE; 64 tokens of SiT
            torch.backends.cuda.enable_cudnn_sdp(True)
            train.build(tiny_config("--disc-weight", "0", "--resolution", resolution), CPU)
            assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_networks_and_images_have_the_memory_format_of_the_device(layout, tiny, monkeypatch):
    """On MPS channels last would give wrong gradients."""
    assert devices.memory_format(MPS) == torch.contiguous_format
    monkeypatch.setattr(devices, "memory_format", lambda device: layout)
    (m, cfg, _), seen = tiny("--disc-start", "0"), []
    m.vae.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), [""] * 4
    train.run_step(m, cfg, 0, batch, 0, 1)
    for net in (m.vae, m.disc, *m.encoders):
        seen += [p for p in net.parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert all(t.is_contiguous(memory_format=layout) for t in seen)


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_missing_compiler_is_printed(capsys):
    no_compiler = {"cpp.cxx": ("/nowhere",), "force_disable_caches": True}
    torch.compiler.reset()                                   # what tests before it have compiled
    with torch._inductor.config.patch(no_compiler):
        assert not devices.can_compile(CPU, devices.Processes())
    out = capsys.readouterr().out
    assert "No working C++ compiler" in out and "running eagerly" in out and out.count("\n") == 1
    assert devices.can_compile(CPU, devices.Processes()) and not capsys.readouterr().out
    assert not devices.can_compile(MPS, devices.Processes()) and "MPS" in capsys.readouterr().out


# --- What is sent once --------------------------------------------------------------------------------------

def test_gradients_are_sent_once_per_step(tiny):
    """With four micro-batches, DDP averages in the last; the gradients are those of plain networks."""
    flags, sent = ["--gradient-accumulation-steps", "4", "--disc-start", "0"], []

    def hook(name, bucket):
        if bucket.is_last():
            sent.append(name)
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    g = torch.Generator().manual_seed(0)
    batch = (torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(4), [""] * 4)
    alone, cfg, _ = tiny(*flags)
    expected = train.run_step(alone, cfg, 0, batch, 0, 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        m, cfg, _ = tiny(*flags)
        train.wrap(m, cfg, 2)                                          # DDP, here over a single process
        for name in ("vae", "disc", "sit"):
            getattr(m, f"ddp_{name}").register_comm_hook(name, hook)
        metrics = train.run_step(m, cfg, 0, batch, 0, 1)
    finally:
        dist.destroy_process_group()
    assert sent == ["vae", "disc", "sit"]
    assert m.ddp_sit._get_ddp_logging_data()["bucket_cap_bytes"] == 100 * 2 ** 20
    for name in ("vae_grad_norm", "grad_norm", "disc_grad_norm"):
        assert metrics[name].item() == pytest.approx(expected[name].item(), rel=1e-4)
