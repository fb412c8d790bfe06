"""Evaluation while training: the values of fid.py, at the steps asked for, for any number of processes."""
import math

import pytest
import torch

import fid
from conftest import CPU, ROOT, SHORT, metrics_of, one_line, run, torchrun
from data.images import ImageFolder
from sample import Sampler
from support.devices import Processes

FLAGS = [*SHORT, "--disc-weight", "0", "--eval-steps", "3", "--eval-samples", "6", "--log-steps", "4",
         "--sampling-steps", "0", "--checkpointing-steps", "3"]
DISTANCE = "fd_efficientnet-lite2"


@pytest.fixture(scope="module")
def evaluated(image_dir, tmp_path_factory):
    """A run of 4 steps, evaluated at steps 3 and 4."""
    folder = tmp_path_factory.mktemp("evaluated")
    run("python", ROOT / "train.py", "--data-dir", image_dir, "--exp-name", "a", *FLAGS, cwd=folder)
    return folder


def values_of(folder):
    return {row["step"]: row[DISTANCE] for row in metrics_of(folder) if DISTANCE in row}


def test_distance_is_that_of_fid_py(evaluated, image_dir, command):
    """Of the checkpoint, against the same images and against the statistics that the run keeps."""
    found = values_of(evaluated / "exps/a")
    assert list(found) == [3, 4]
    checkpoint, (kept,) = evaluated / "exps/a/checkpoints/0000003.pt", evaluated.glob("exps/a/reference-*.npz")
    for reference in (image_dir, kept):
        out = command("fid", reference, "--ckpt", checkpoint, "--num-samples", "6", "--device", "cpu",
                      "--num-workers", "0", "--features", fid.LITE2)
        value = next(line.split()[1] for line in out.splitlines() if DISTANCE in line.split())
        assert float(value) == pytest.approx(found[3], rel=1e-5)


def test_denoising_loss_is_the_mean_squared_error_of_the_velocity(tiny, evaluated, image_dir):
    m, cfg, _ = tiny("--val-dir", str(image_dir), "--path-type", "cosine")
    images, labels = ImageFolder(image_dir, 32).some(5)
    g = torch.Generator().manual_seed(0)
    noise, eps = torch.randn(2, 5, 8, 8, 8, generator=g)
    t = torch.rand(5, generator=g)
    a, s = (f(math.pi / 2 * t).view(5, 1, 1, 1) for f in (torch.cos, torch.sin))
    with torch.no_grad():
        mean, logvar = m.vae.encode(images / 127.5 - 1).moments.chunk(2, 1)
        z = (mean + (logvar / 2).exp() * noise - m.ema.bn.running_mean.view(1, -1, 1, 1)) / (
            m.ema.bn.running_var.view(1, -1, 1, 1) + 1e-4).sqrt()
        error = m.ema(a * z + s * eps, t, labels)[0] - math.pi / 2 * (a * eps - s * z)
    found = fid.denoising_loss(Sampler(m.ema, m.vae, vars(cfg), 0, CPU), images, labels)
    assert found == pytest.approx(error.square().mean().item(), rel=1e-4)
    assert 0 < metrics_of(evaluated / "exps/a")[-1]["train_denoising_loss"] < 10


def test_resuming_and_two_processes_change_no_value(evaluated, image_dir, tmp_path):
    """The statistics of the reference are computed once per run."""
    found, flags = values_of(evaluated / "exps/a"), ["--data-dir", image_dir, "--exp-name", "b", *FLAGS]
    run("python", ROOT / "train.py", *flags, "--max-train-steps", "3", cwd=tmp_path)
    kept, = tmp_path.glob("exps/b/reference-*.npz")
    written = kept.stat().st_mtime_ns
    run("python", ROOT / "train.py", *flags, "--resume", cwd=tmp_path)
    assert values_of(tmp_path / "exps/b") == found and kept.stat().st_mtime_ns == written
    flags[3] = "two"
    run(*torchrun(2), ROOT / "train.py", *flags, cwd=tmp_path)
    assert list(values_of(tmp_path / "exps/two").values()) == pytest.approx(list(found.values()), rel=1e-2)


def test_kept_statistics_are_those_of_the_reference(image_dir, tmp_path):
    """Another folder and another resolution have their own."""
    def mean(folder, resolution):
        evaluation = fid.RunEvaluation(tmp_path, folder, resolution, 4, CPU, 0, Processes())
        return evaluation.reference[evaluation.nets[0].id, "pool"][0]

    first, *others = [mean(*which) for which in ((image_dir, 32), (image_dir / "one", 32), (image_dir, 16))]
    assert torch.equal(mean(image_dir, 32), first) and not any(torch.allclose(first, other) for other in others)


def test_evaluation_does_not_change_the_training(evaluated, image_dir, command, tmp_path):
    flags = ["--data-dir", image_dir, "--exp-name", "c", *FLAGS, "--eval-steps", "0"]
    run("python", ROOT / "train.py", *flags, cwd=tmp_path)
    with_it, without = (torch.load(folder / "checkpoints/0000004.pt", weights_only=True)["model"]
                        for folder in (evaluated / "exps/a", tmp_path / "exps/c"))
    assert all(torch.equal(tensor, without[name]) for name, tensor in with_it.items())


def test_what_cannot_be_evaluated(image_dir, tmp_path, command):
    flags = ["--data-dir", image_dir, *FLAGS]
    one_line(command("train", *flags, "--vae-only", code=2), "--eval-steps: --vae-only trains no SiT")
    (tmp_path / "other").mkdir()
    one_line(command("train", *flags, "--eval-ref", tmp_path / "other", code=2), "no images in it")
    (tmp_path / "other/three").symlink_to(image_dir / "one")
    (tmp_path / "other/two words").symlink_to(image_dir / "two words")
    one_line(command("train", *flags, "--val-dir", tmp_path / "other", code=2),
             "classes that the data lacks: three")
