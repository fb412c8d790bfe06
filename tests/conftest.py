"""What the tests share: running commands, small images, a short run, a checkpoint, the tiny preset's
networks."""
import hashlib
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fid
import sample
import sit
import train
import vae
from support.commands import STOP_SIGNALS, run_command
from support.metrics import read_rows

CPU = torch.device("cpu")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
slow, needs = pytest.mark.slow, pytest.mark.peers                                # @slow; @needs("package")
SHORT = ["--model", "SiT-T/2", "--projector-dim", "32", "--batch-size", "4", "--max-train-steps", "4",
         "--log-steps",
         "1", "--sampling-steps", "0", "--cfg-scale", "1", "--lr-warmup-steps", "200", "--lr-decay-steps",
         "0",
         "--num-workers", "0", "--mixed-precision", "no", "--device", "cpu"]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; skipped without SLOW=1")
    config.addinivalue_line("markers", "peers(package): needs a package that is not in requirements.txt")


def pytest_runtest_setup(item):
    if item.get_closest_marker("slow") and not os.environ.get("SLOW"):
        pytest.skip("takes minutes: SLOW=1 runs it")
    for mark in item.iter_markers("peers"):
        if not find_spec(mark.args[0]):
            pytest.skip(f"needs {mark.args[0]}")


def torchrun(processes):
    """Its command line; a free port each time."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def run(*command, cwd, env=None, code=0, timeout=600):
    """Run a command in a folder; check its exit code; return its output."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
    command = [str(word) for word in command]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def run_here(script, *flags, cwd):
    """Run train, sample, fid or vae in this process, which starts faster, and undo its settings; its exit
    code."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    tf32 = {module: module.allow_tf32 for module in (torch.backends.cuda.matmul, torch.backends.cudnn)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        try:
            run_command(dict(train=train, sample=sample, fid=fid, vae=vae)[script].main)
        except SystemExit as e:
            return e.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for module, value in tf32.items():
                module.allow_tf32 = value
    return 0


@pytest.fixture
def command(capsys, tmp_path):
    """command(script, *flags): run_here in tmp_path, its exit code checked; returns what it printed."""
    def call(script, *flags, cwd=tmp_path, code=0):
        capsys.readouterr()
        ended = run_here(script, *flags, cwd=cwd)
        out, err = capsys.readouterr()
        assert ended == code, out[-3000:] + err[-3000:]
        return out + err
    return call


@pytest.fixture
def call(monkeypatch, capsys):
    """call(main, *argv): the main() of a script with these arguments; returns what it printed."""
    def call(main, *argv):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, argv)])
        main()
        return capsys.readouterr().out
    return call


def one_line(output, *words):
    """A command's output has one error line that holds these words, and no traceback."""
    lines = [line for line in output.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "Traceback" not in output and all(w in lines[0] for w in words), output


def metrics_of(folder):
    """The rows of a run's metrics.jsonl."""
    return read_rows(Path(folder) / "metrics.jsonl")


def losses(folder):
    """The losses in a run's metrics.jsonl, one row per step."""
    return [{k: v for k, v in row.items() if "loss" in k or k == "step"} for row in metrics_of(folder)]


def close(a, b, rtol):
    """|a - b| <= rtol max |b|, for arrays or tensors."""
    a, b = np.asarray(a), np.asarray(b)
    assert np.abs(a - b).max() <= rtol * np.abs(b).max()


def statistics(channels):
    """(mean, std) of latents, [C] each."""
    return torch.linspace(-1, 2, channels), torch.linspace(0.5, 3, channels)


def flatten(tree, prefix=""):
    """[(name, tensor)] of nested dicts."""
    if isinstance(tree, dict):
        return [pair for k, v in tree.items() for pair in flatten(v, f"{prefix}.{k}")]
    return [(prefix, tree)] if isinstance(tree, torch.Tensor) else []


def digest(module):
    """(number, hash) of the lines 'name shape' of its tensors."""
    lines = sorted(f"{name} {tuple(t.shape)}" for name, t in module.state_dict().items())
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def smooth_images(n, size, seed=0, blur=4):
    """Random smooth images uint8 [n, size, size, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, blur, blur, 3), dtype=np.uint8)
    return np.stack([np.array(Image.fromarray(c).resize((size, size), Image.BICUBIC)) for c in coarse])


def nchw(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def noise_images(folder, n, size=40, seed=0):
    """n little PNGs 000.png, ... of noise in a folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def save_checkpoint(file, num_classes=3, cfg_prob=0.1, prefix="", **args):
    """A training checkpoint of random weights, every gate open: 32 pixels, 8x8 latents."""
    torch.manual_seed(0)
    net, autoencoder = sit.SiT("SiT-T/2", 8, 8, num_classes, cfg_prob,
                               encoder_depth=1), vae.AutoencoderKL("f4d8")
    net.bn.set_statistics(*statistics(8))
    for name, p in net.named_parameters():
        if "adaLN" in name or "final_layer.linear" in name:
            torch.nn.init.normal_(p, 0, 0.05)
        elif "embedding_table" in name:
            torch.nn.init.normal_(p, 0, 1)                            # so that a label shows in the image
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    args = dict(num_classes=num_classes, cfg_prob=cfg_prob, path_type="linear", data_dir="some/images",
                ema_decay=0.5) | args
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(model=state, ema=state, vae=autoencoder.state_dict(), args=args, steps=7), file)
    return file


def tiny_config(*flags):
    return train.parse_config([*SHORT, "--seed", "1", "--num-classes", "10", "--disc-weight", "0.1",
                               "--disc-start", "1000", *flags])


@pytest.fixture
def tiny():
    """make(*flags) -> (networks, config, one step's arguments), float32, random weights with every gate
    open."""
    def make(*flags, device="cpu"):
        cfg, device = tiny_config(*flags), torch.device(device)
        m = train.build(cfg, device)
        train.wrap(m, cfg, 1)
        g = torch.Generator().manual_seed(0)
        for net in (m.sit, m.ema):                                # adaLN-Zero starts as the identity: open it
            for name, p in net.named_parameters():
                if "adaLN" in name or "final_layer.linear" in name or "embedding_table" in name:
                    p.data.copy_(torch.empty(p.shape).normal_(0, 0.05 if "adaLN" in name else 0.3,
                                                              generator=g))
        x = (torch.rand(4, 3, 32, 32, generator=g) * 2 - 1).to(device)
        y = torch.tensor([0, 1, 2, 3], device=device)
        return m, cfg, (x, y, None, *train.draw_noise(cfg, 0, (8, 8, 8), 0, 1, device))  # z: the VAE trains
    return make


@pytest.fixture(scope="session")
def image_dir(tmp_path_factory):
    """A folder of 2 classes x 12 small images."""
    folder = tmp_path_factory.mktemp("images")
    for seed, name in enumerate(("one", "two words")):
        noise_images(folder / name, 12, seed=seed)
    return folder


@pytest.fixture(scope="session")
def frozen_vae(tmp_path_factory):
    """Random weights of the tiny preset's VAE in a file, its latent statistics beside it."""
    torch.manual_seed(0)
    file, (mean, std) = tmp_path_factory.mktemp("vae") / "f4d8.pt", statistics(8)
    torch.save(vae.AutoencoderKL("f4d8").state_dict(), file)
    torch.save(dict(latents_scale=1 / std.view(1, 8, 1, 1), latents_bias=mean.view(1, 8, 1, 1)),
               file.with_name("f4d8-latents-stats.pt"))
    return file


@pytest.fixture(scope="session")
def short_run(image_dir, tmp_path_factory):
    """A folder in which four steps without GAN were run: exps/a, checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--data-dir", image_dir, "--exp-name", "a", "--disc-weight", "0", "--checkpointing-steps", "2",
             *SHORT]
    assert run_here("train", *flags, cwd=folder) == 0
    return folder
