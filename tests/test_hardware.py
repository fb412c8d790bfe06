"""Machines that differ: precision by the hardware, layouts on MPS, compilers, memory that ends, gradients sent."""
import os
import platform
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
import torch.distributed as dist

import repa
import train
from conftest import CPU, ROOT, SHORT, one_line, run_here
from data import images
from support import commands, devices

CUDA, MPS = torch.device("cuda", 0), torch.device("mps")


@pytest.fixture
def cpu(monkeypatch):
    """pretend(machine, has the x86 instructions, what oneDNN says) -> nothing."""
    def pretend(machine, instructions, onednn):
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    return pretend


@pytest.mark.parametrize("machine, instructions, onednn, expected", [
    ("x86_64", True, True, "bf16"),                                     # avx512_bf16
    ("x86_64", False, True, "no"),                                      # AVX-512 alone: oneDNN emulates
    ("AMD64", False, True, "no"),                                       # the same under Windows
    ("x86_64", True, False, "no"),                                      # told to use AVX2
    ("aarch64", False, True, "bf16"), ("aarch64", False, False, "no")])
def test_auto_takes_bf16_where_the_cpu_computes_it(machine, instructions, onednn, expected, cpu, capsys):
    cpu(machine, instructions, onednn)
    assert devices.choose_precision("auto", CPU, devices.Processes()) == expected
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and ("precision: bf16" if expected == "bf16" else "precision: float32") in said


def test_what_is_asked_for_is_done_and_a_slow_choice_told(cpu, capsys):
    cpu("x86_64", False, True)
    assert devices.choose_precision("bf16", CPU, devices.Processes()) == "bf16"
    assert capsys.readouterr().out.count("warning: this cpu only emulates bf16") == 1
    assert devices.choose_precision("no", CPU, devices.Processes()) == "no" and not capsys.readouterr().out
    cpu("x86_64", True, True)
    assert devices.choose_precision("bf16", CPU, devices.Processes()) == "bf16" and not capsys.readouterr().out
    assert devices.choose_precision("auto", MPS, devices.Processes()) == "no"


@pytest.mark.parametrize("major, expected", [(7, "no"), (8, "bf16"), (9, "bf16")])        # T4 and V100 are 7.x
def test_auto_on_gpus(major, expected, monkeypatch):
    class Properties:
        pass

    properties = Properties()
    properties.major = major
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert devices.choose_precision("auto", CUDA, devices.Processes()) == expected


def test_cudnns_attention_is_off_where_its_gradients_were_nan(tiny):
    """For tokens or latent positions of an odd number of half tiles; not at the paper's sizes."""
    def stays(action, *args):
        torch.backends.cuda.enable_cudnn_sdp(True)
        action(*args)
        return torch.backends.cuda.cudnn_sdp_enabled()

    try:
        assert stays(devices.avoid_wrong_attention, 1024, 256) and stays(devices.avoid_wrong_attention, 4096, 128, 16)
        assert not stays(devices.avoid_wrong_attention, 256, 64) and not stays(devices.avoid_wrong_attention, 192)
        assert not stays(tiny)                                          # 8 x 8 latents, 4 x 4 tokens
        assert stays(tiny, "--resolution", "64", "--model", "SiT-T/1")  # 16 x 16, and as many tokens
        assert not stays(tiny, "--resolution", "64")                    # in patches of 2
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_the_commands_run_in_the_precision_that_was_chosen(cpu, pictures, tmp_path, command):
    """The three programs; a run goes on in another precision, and says so."""
    flags = ["--data-dir", pictures, *SHORT, "--mixed-precision", "auto", "--max-train-steps"]
    cpu("x86_64", False, True)
    assert "precision: float32" in command("train", *flags, "1")
    cpu("x86_64", True, True)
    out = command("train", *flags, "2", "--resume")
    assert "precision: bf16" in out and "going on with another mixed_precision: no -> bf16" in out
    draw = ["--num-steps", "1", "--device", "cpu", "--mixed-precision", "auto"]
    assert "precision: bf16" in command("sample", *draw, "--num-samples", "2")
    assert "precision: bf16" in command("fid", *draw, "--num-samples", "4", "--features", repa.LITE2,
                                        "--num-workers", "0")
    assert "precision: " not in command("fid", pictures, pictures, "--features", repa.LITE2, "--num-workers", "0",
                                      "--resolution", "32")


@pytest.mark.parametrize("capability, built_for, expected", [
    ((7, 0), ["sm_75", "sm_80", "sm_90"], False),                       # V100 under today's wheels
    ((8, 6), ["sm_75", "sm_80", "sm_90"], True),                        # kernels of an earlier minor version
    ((10, 3), ["sm_80", "sm_90"], False), ((8, 0), ["sm_86"], False), ((9, 0), ["sm_90a"], True),
    ((12, 0), ["sm_90", "sm_120"], True),
    ((10, 3), ["sm_80", "compute_90"], True),                           # compiled on the way
    ((7, 5), ["sm_80", "compute_80"], False), ((9, 4), ["gfx942"], True)])
def test_a_gpu_without_kernels_is_known(capability, built_for, expected):
    assert devices.has_kernels(capability, built_for) is expected


def test_image_tensors_are_contiguous_on_mps_alone():
    assert devices.memory_format(MPS) == devices.memory_format("mps") == torch.contiguous_format
    assert devices.memory_format(CPU) == devices.memory_format(CUDA) == torch.channels_last


def test_nothing_is_channels_last_on_mps(tiny, monkeypatch):
    """A pretended Mac: networks and images of a step, all contiguous; channels last here."""
    for pretended in (False, True):
        if pretended:
            for module in (train, repa):
                monkeypatch.setattr(module, "memory_format", lambda device: torch.contiguous_format)
        m, cfg, _ = tiny("--disc-start", "0")
        seen = []
        m.vae.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        batch = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), [""] * 4
        train.run_step(m, cfg, 0, batch, 0, 1)
        parameters = [p for net in (m.vae, m.disc, *m.encoders) for p in net.parameters()]
        weights = [p for p in parameters if p.ndim == 4 and p.shape[1] > 1]
        assert all(t.is_contiguous() is pretended for t in seen) and seen
        assert all(p.is_contiguous() for p in weights) or not pretended
        assert any(not p.is_contiguous() for p in weights) or pretended


def test_what_compiling_lacks_is_said(monkeypatch, tmp_path):
    assert "MPS" in devices.why_no_compile(MPS)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert devices.why_no_compile(CPU) == "no C++ compiler here"
        assert devices.why_no_compile(CUDA) == "no C compiler here"
    monkeypatch.setattr(shutil, "which", lambda name: name)
    with monkeypatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        assert "no Python.h" in devices.why_no_compile(CPU)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert devices.why_no_compile(CPU) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "capability 7.0" in devices.why_no_compile(CUDA)


# --- When memory ends ---------------------------------------------------------------------------------------

def ended(error, capsys, **hint):
    """What run_command prints for a program that raises this; its exit code must be 2."""
    def program():
        raise error
    with pytest.raises(SystemExit) as stopped:
        commands.run_command(program, **hint)
    assert stopped.value.code == 2
    return capsys.readouterr().err


CUDA_MEMORY = ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which "
               "1.20 GiB is free. Including non-PyTorch memory, this process has 22.43 GiB memory in use.\nmore")
BUS_ERROR = ("DataLoader worker (pid 77) is killed by signal: Bus error. It is possible that dataloader's workers are "
             "out of shared memory. Please try to raise your shared memory limit.")


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError(CUDA_MEMORY), ("2.50 GiB", "23.64 GiB", "TAKE LESS")),
    (RuntimeError(BUS_ERROR), ("--num-workers 0", "--shm-size")),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_77_1>: No space left"), ("--shm-size",)),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), ("--num-workers", "TAKE LESS")),
    (RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GiB)"), ("17.9 GiB", "TAKE LESS")),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
     ("the GPU's memory", "cublasCreate", "TAKE LESS")),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1073741824 bytes."), ("1.00 GiB",)),
    (MemoryError("Unable to allocate 9 GiB"), ("9 GiB", "TAKE LESS"))])
def test_memory_that_ends_is_one_line(error, words, capsys):
    one_line(ended(error, capsys, less_memory="TAKE LESS"), *words)


def test_the_cpus_allocator_is_understood(capsys):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    one_line(ended(caught.value, capsys), "4194304.00 GiB more", "a smaller --batch-size")


@pytest.mark.parametrize("text", ["a bug", "No valid triton configs. OutOfResources: out of resource: shared memory"])
def test_other_errors_keep_their_traceback(text):
    def program():
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match=text.split(".")[0]):
        commands.run_command(program)


def test_a_run_out_of_memory_keeps_its_checkpoints(short_run, pictures, tmp_path, monkeypatch, capsys):
    """Memory ends in the third step; the checkpoint of the second is whole and the run goes on from it."""
    step_of = train.train_step

    def third_fails(m, cfg, step, *args):
        if step == 2:
            raise torch.OutOfMemoryError(CUDA_MEMORY)
        return step_of(m, cfg, step, *args)

    flags = ["--data-dir", pictures, *SHORT, "--checkpointing-steps", "1", "--vae-only"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", third_fails)
        patch.chdir(tmp_path)
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        with pytest.raises(SystemExit):
            commands.run_command(train.main, "TAKE LESS")
    one_line(capsys.readouterr().err, "TAKE LESS")
    assert run_here("train", *flags, "--resume", cwd=tmp_path) == 0
    assert sorted(p.name for p in (tmp_path / "exps/tiny/checkpoints").iterdir()) == ["0000003.pt", "0000004.pt"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("unshare"),
                    reason="mounting takes root")
def test_a_small_shared_memory_is_one_line(pictures, tmp_path):
    """Loader processes in a container whose /dev/shm has 2 MB, as docker's has 64."""
    train_py = [sys.executable, str(ROOT / "train.py"), "--data-dir", str(pictures), *SHORT, "--resolution", "256",
                "--batch-size", "16", "--num-workers", "2", "--vae-only"]
    shell = "mount -t tmpfs -o size=2m tmpfs /dev/shm || exit 77; exec \"$@\""
    done = subprocess.run(["unshare", "-m", "sh", "-c", shell, "sh", *train_py], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip("no mounts here: " + done.stderr[-200:])
    assert done.returncode == 2, done.stderr[-2000:]
    one_line(done.stderr.replace("\r", "\n"), "--num-workers 0", "--shm-size")


# --- What is sent and read once -----------------------------------------------------------------------------

def test_gradients_are_sent_once_a_batch(tiny):
    """Four parts of a batch: DDP averages in the last alone, and the gradients are those of one part."""
    sent = []

    def hook(state, bucket):
        sent.append(state)
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        m, cfg, _ = tiny("--gradient-accumulation-steps", "4", "--disc-start", "0")
        train.wrap(m, cfg, 2)                                          # DDP, here over a single process
        for name, net in (("vae", m.ddp_vae), ("sit", m.ddp_sit), ("disc", m.ddp_disc)):
            net.register_comm_hook(name, hook)
        g = torch.Generator().manual_seed(0)
        batch = (torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(4), [""] * 4)
        metrics, counts = train.run_step(m, cfg, 0, batch, 0, 1), []
        for parts in (1, 4, 1):                                        # DDP cuts its buckets anew after a first step
            sent.clear()
            cfg.gradient_accumulation_steps = parts
            train.run_step(m, cfg, 1, batch, 0, 1)
            assert set(sent) == {"vae", "sit", "disc"}
            counts.append(len(sent))
        assert counts[0] == counts[1] == counts[2]
    finally:
        dist.destroy_process_group()
    alone, cfg, _ = tiny("--gradient-accumulation-steps", "4", "--disc-start", "0")
    expected = train.run_step(alone, cfg, 0, batch, 0, 1)
    for name in ("vae_grad_norm", "grad_norm", "disc_grad_norm"):
        assert metrics[name].item() == pytest.approx(expected[name].item(), rel=1e-4)


class WhoReads(torch.utils.data.Dataset):
    """40 images filled with a number of the process that read them."""
    files = [b""] * 40

    def __len__(self):
        return 40

    def __getitem__(self, item):
        return torch.full((3, 2, 2), float(os.getpid())), 0, ""


def test_latents_are_cached_by_one_set_of_loader_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CHUNK", 8)
    readers = set()

    def encode(x):
        readers.update(x[:, 0, 0, 0].tolist())
        return x[:, :, :1, :1]

    images.cache_latents(WhoReads(), tmp_path, encode, 1, devices.Processes())
    assert len(list(tmp_path.glob("*.pt"))) == 5 and len(readers) == 1 and os.getpid() not in readers
