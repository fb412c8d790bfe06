"""Machines that differ: precision, Macs, compilers, out of memory, what is sent and read once."""
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import repa
import train
from conftest import CPU, ROOT, SHORT, one_line, run
from data import images, latents
from support import devices
from support.checkpoints import checkpoints

MPS = torch.device("mps")


# --- Precision --------------------------------------------------------------------------------------------------------

def test_auto_is_bf16_where_it_is_faster():
    """Compared with the time of a linear layer; where bf16 is emulated it is never chosen."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = torch.nn.Linear(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        with torch.no_grad():
            layer(x)
            starts = [(time.perf_counter(), layer(x), time.perf_counter()) for _ in range(5)]
        seconds[dtype] = min(end - start for start, _, end in starts)
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    if not 0.8 < ratio < 1.25:
        chosen = "bf16" if ratio < 1 else "no"
        assert devices.choose_precision("auto", CPU, devices.Processes()) == chosen
    choose = ("import torch; from support import devices; "
              "print(devices.choose_precision('{}', torch.device('cpu'), devices.Processes()))")
    emulated = dict(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
    if devices.is_x86():
        for asked, printed in (("auto", ["precision: float32 (bf16 is not faster here)", "no"]),
                               ("bf16", ["warning: bf16 is not faster here than --mixed-precision no", "bf16"]),
                               ("no", ["no"])):
            out = run(sys.executable, "-c", choose.format(asked), cwd=ROOT, env=emulated)
            assert out.splitlines() == printed
    assert devices.choose_precision("auto", MPS, devices.Processes()) == "no"


def test_commands_use_the_chosen_precision(image_dir, tmp_path, command):
    flags = ["--data-dir", image_dir, *SHORT, "--max-train-steps"]
    command("train", *flags, "1")
    out = command("train", *flags, "2", "--resume", "--mixed-precision", "bf16")
    assert "resuming with a changed mixed_precision: no -> bf16" in out
    sampling = ["--num-samples", "4", "--num-steps", "1", "--device", "cpu", "--mixed-precision", "auto"]
    assert "precision: " in command("sample", *sampling)
    assert "precision: " in command("fid", *sampling, "--features", repa.LITE2, "--num-workers", "0")


# --- Wrong kernels, Macs, compilers -----------------------------------------------------------------------------------

def test_cudnn_attention_is_off_where_its_gradients_are_wrong(image_dir, tmp_path, command):
    def stays_on(*tokens):
        torch.backends.cuda.enable_cudnn_sdp(True)
        devices.disable_wrong_attention(*tokens)
        return torch.backends.cuda.cudnn_sdp_enabled()

    try:
        assert stays_on(1024, 256) and stays_on(4096, 128, 16)
        assert not stays_on(256, 64) and not stays_on(192)
        torch.backends.cuda.enable_cudnn_sdp(True)
        command("train", "--data-dir", image_dir, *SHORT, "--max-train-steps", "1", "--vae-only")
        assert not torch.backends.cuda.cudnn_sdp_enabled()              # 8 x 8 latents
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("mac", [False, True])
def test_nothing_is_channels_last_on_mps(mac, tiny, monkeypatch):
    assert devices.memory_format(MPS) == devices.memory_format("mps") == torch.contiguous_format
    layout = torch.contiguous_format if mac else torch.channels_last
    monkeypatch.setattr(devices, "memory_format", lambda device: layout)
    m, cfg, _ = tiny("--disc-start", "0")
    seen = []
    m.vae.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    batch = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), [""] * 4
    train.run_step(m, cfg, 0, batch, 0, 1)
    assert seen == [mac]
    for net in (m.vae, m.disc, *m.encoders):
        assert all(p.is_contiguous() for p in net.parameters() if p.ndim == 4 and p.shape[1] > 1) == mac


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_missing_compiler_is_printed(capsys):
    no_compiler = {"cpp.cxx": ("/nowhere",), "force_disable_caches": True}
    torch.compiler.reset()                                   # what tests before it have compiled
    with torch._inductor.config.patch(no_compiler):
        assert not devices.can_compile(CPU, devices.Processes())
    out = capsys.readouterr().out
    assert "No working C++ compiler" in out and "running eagerly" in out and out.count("\n") == 1
    assert devices.can_compile(CPU, devices.Processes()) and not capsys.readouterr().out
    assert not devices.can_compile(MPS, devices.Processes()) and "MPS" in capsys.readouterr().out


# --- Out of memory ----------------------------------------------------------------------------------------------------

def test_a_run_out_of_memory_keeps_its_checkpoints(image_dir, tmp_path, monkeypatch, command):
    """In its third step; it resumes from the second."""
    step_of = train.train_step

    def third_fails(m, cfg, step, *args):
        if step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step_of(m, cfg, step, *args)

    flags = ["--data-dir", image_dir, *SHORT, "--checkpointing-steps", "1", "--vae-only"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", third_fails)
        one_line(command("train", *flags, code=2), "CUDA out of memory", "--batch-size")
    command("train", *flags, "--resume")
    assert [path.stem for path in checkpoints(tmp_path / "exps/tiny")] == ["0000003", "0000004"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("unshare"),
                    reason="mounting takes root")
def test_too_little_shared_memory_is_one_line(tmp_path):
    """As in a container: /dev/shm of 2 MB, and loader processes that send 4 MB."""
    code = ("import torch\nfrom support.commands import run_command\nclass Data(torch.utils.data.Dataset):\n"
            "    def __len__(self):\n        return 4\n"
            "    def __getitem__(self, i):\n        return torch.zeros(1 << 20)\n"
            "run_command(lambda: list(torch.utils.data.DataLoader(Data(), num_workers=1)))")
    shell = 'mount -t tmpfs -o size=2m tmpfs /dev/shm || { echo error: no mounts; exit 2; }; exec "$@"'
    out = run("unshare", "-m", "sh", "-c", shell, "sh", sys.executable, "-c", code, cwd=tmp_path, code=2)
    if "no mounts" in out:
        pytest.skip(out)
    one_line(out.replace("\r", "\n"), "--num-workers 0", "--shm-size")


# --- What is sent and read once ---------------------------------------------------------------------------------------

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
    for name in ("vae_grad_norm", "grad_norm", "disc_grad_norm"):
        assert metrics[name].item() == pytest.approx(expected[name].item(), rel=1e-4)


def test_one_loader_reads_for_all_files_of_latents(image_dir, tmp_path, monkeypatch):
    loaders, load_batches = [], images.load_batches
    monkeypatch.setattr(images, "CHUNK", 8)
    monkeypatch.setattr(images, "load_batches", lambda *args: loaders.append(args) or load_batches(*args))
    folder = latents.cache_latents(images.ImageFolder(image_dir, 32), tmp_path, hashlib.sha256(),
                                   lambda x: x[:, :, :1, :1], 0, devices.Processes())
    assert len(list(Path(folder).glob("*.pt"))) == 3 and len(loaders) == 1
