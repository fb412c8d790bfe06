"""sample.py: samplers compared with closed forms and manual steps; checkpoints, labels, files."""
import argparse
import errno
import math
import os
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import repa
import sample
import sit
import vae
from conftest import CPU, one_line, save_checkpoint, statistics
from support.commands import UserError
from support.files import load_tensors

MEAN, STD = 1.5, 0.5                                                    # data ~ N(MEAN, STD^2)
FEW = ["--device", "cpu", "--num-steps", 2]


# --- Samplers -----------------------------------------------------------------------------------------------

def coefficients(t, path_type):
    """alpha, sigma and their derivatives at t, numbers."""
    if path_type == "linear":
        return 1 - t, t, -1, 1
    quarter, angle = math.pi / 2, math.pi / 2 * t
    return math.cos(angle), math.sin(angle), -quarter * math.sin(angle), quarter * math.cos(angle)


def gaussian_velocity(path_type):
    """E[velocity | x_t] for Gaussian data, in closed form."""
    def velocity(x, t, guided):
        a, s, da, ds = coefficients(t, path_type)
        return da * MEAN + (da * a * STD ** 2 + ds * s) / (a * a * STD ** 2 + s * s) * (x - a * MEAN)
    return velocity


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_steps_are_those_of_euler_and_of_the_reverse_sde(path_type):
    """Of the SDE: diffusion w(t) = 2t, the score in closed form, times 1 to 0.04, a last step without noise."""
    velocity = gaussian_velocity(path_type)
    start = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    for mode, times in (("ode", [1, 2 / 3, 1 / 3, 0]), ("sde", [1, 0.52, 0.04, 0])):
        x, draws = start, iter((0.3, -0.2))
        for t, t_next in pairwise(times):
            drift = velocity(x, t, False)
            if mode == "sde":
                a, s, _, _ = coefficients(t, path_type)
                drift = drift - t * (a * MEAN - x) / (a * a * STD ** 2 + s * s)
                x = x + (2 * t * (t - t_next)) ** 0.5 * (next(draws) if t_next else 0)
            x = x + drift * (t_next - t)
        found = sample.integrate(velocity, start, mode, 3, False, path_type, iter((0.3, -0.2)).__next__)
        assert torch.allclose(found, x)


@torch.no_grad()
def test_images_equal_those_of_manual_steps(tiny):
    """Heun with guidance, from each image's own noise, in float64, decoded with the average's statistics."""
    m, cfg, _ = tiny()
    m.ema.bn.set_statistics(*statistics(8))
    sampler = sample.Sampler(m.ema, m.vae, vars(cfg), 0, CPU)
    mean, std = (value.view(1, 8, 1, 1) for value in statistics(8))
    y, null = torch.tensor([3, 1]), torch.tensor([10, 10])

    def velocity(z, t, guided):
        t = torch.full((2,), t)
        v = m.ema(z.float(), t, y)[0].double()
        if guided:
            v_null = m.ema(z.float(), t, null)[0].double()
            v = v_null + 2.5 * (v - v_null)
        return v

    noise = [np.random.default_rng((5, i)).standard_normal((8, 8, 8), np.float32) for i in (3, 11)]
    z, times = torch.from_numpy(np.stack(noise)).double(), [1, 0.75, 0.5, 0.25, 0]
    for t, t_next in zip(times, times[1:], strict=False):
        guided = 0.25 <= t <= 0.75                           # by the step's start, so 0.25 -> 0 as well
        v = velocity(z, t, guided)
        v_next = v if t_next == 0 else velocity(z + (t_next - t) * v, t_next, guided)
        z = z + (t_next - t) * (v + v_next) / 2
    images = ((m.vae.decode(z.float() * std + mean) + 1) * 127.5).round().clamp(0, 255)
    settings = dict(num_steps=4, cfg_scale=2.5, guidance_low=0.25, guidance_high=0.75, seed=5)
    got = sample.sample_images(sampler, [3, 11], [3, 1], heun=True, **settings)
    assert got.dtype == torch.uint8 and (got - images).abs().max() <= 1 and (got
                                                                             == images).float().mean() > 0.95
    assert images.std() > 5

    settings["mode"] = "sde"                                 # an image depends on seed and index alone
    together = sample.sample_images(sampler, [0, 7], [0, 7], **settings).int()
    apart = torch.cat([sample.sample_images(sampler, [i], [i], **settings) for i in (0, 7)]).int()
    assert (together - apart).abs().max() <= 1 < (together[0] - together[1]).abs().max()
    cosine = sampler._replace(args=sampler.args | dict(path_type="cosine"))
    assert (sample.sample_images(cosine, [0, 7], [0, 7], **settings).int() - together).abs().max() > 1


# --- Checkpoints --------------------------------------------------------------------------------------------

def release(short_run, file, **changes):
    """One of our checkpoints in the form of the authors' release, written to `file`."""
    ckpt = load_tensors(short_run / "exps/a/checkpoints/0000004.pt")
    args = {k: ckpt["args"][k]
            for k in ("model", "vae", "resolution", "cfg_prob", "path_type", "encoder_depth")}
    ckpt |= dict(args=argparse.Namespace(**args)) | changes
    torch.save({k: v for k, v in ckpt.items() if v is not None}, file)
    return ckpt


def test_released_checkpoints_are_sampled(short_run, tmp_path):
    own = sample.load_checkpoint(short_run / "exps/a/checkpoints/0000004.pt")
    ckpt = release(short_run, tmp_path / "first.pt")
    first = sample.load_checkpoint(tmp_path / "first.pt")
    release(short_run, tmp_path / "bare_args.pt", args=argparse.Namespace())
    bare = sample.load_checkpoint(tmp_path / "bare_args.pt")
    norm = first.sit.bn
    torch.save(ckpt["vae"], tmp_path / "tuned.pt")
    scale = 1 / (norm.running_var + norm.eps).sqrt()
    torch.save(dict(latents_scale=scale.view(1, 8, 1, 1), latents_bias=norm.running_mean.view(1, 8, 1, 1)),
               tmp_path / "tuned-latents-stats.pt")
    ema = {k: v for k, v in ckpt["ema"].items() if not k.startswith("bn.")}
    release(short_run, tmp_path / "second.pt", vae=None, ema=ema, discriminator=None)
    second = sample.load_checkpoint(tmp_path / "second.pt", vae_ckpt=tmp_path / "tuned.pt")
    images = [sample.sample_images(sampler, range(4), [0, 1, 0, 1], num_steps=3)
              for sampler in (own, first, bare, second)]
    assert all((images[0].int() - other.int()).abs().max() <= 1 for other in images[1:])
    assert own.args["resolution"] == second.args["resolution"] == 32 and bare.sit.null_class == 2

    (tmp_path / "tuned-latents-stats.pt").unlink()
    torch.save(vae.AutoencoderKL("f8d4").state_dict(), tmp_path / "f8d4.pt")
    release(short_run, tmp_path / "third.pt", vae=None)                            # with its own statistics
    for file, vae_ckpt, words in (("second.pt", None, "no VAE in this checkpoint, it was frozen"),
                                  ("second.pt", tmp_path / "tuned.pt", "no latent statistics"),
                                  ("third.pt", tmp_path / "f8d4.pt", "has 8 latent channels, the VAE has 4")):
        with pytest.raises(UserError, match=words):
            sample.load_checkpoint(tmp_path / file, vae_ckpt=vae_ckpt)


def test_sizes_and_qk_norm_come_from_the_tensors(tmp_path, short_run):
    net = sit.SiT("SiT-S/2", 8, 8, 7, qk_norm=True, projectors=[repa.projector("mlp", 384, 16)])
    state = net.state_dict()
    release(short_run, tmp_path / "s2.pt", args=argparse.Namespace(), model=state, ema=state)
    sampler = sample.load_checkpoint(tmp_path / "s2.pt")
    assert sampler.sit.num_classes == 7 and sampler.sit.patch == 2 and sampler.args["resolution"] == 32
    assert torch.equal(sampler.sit.blocks[0].attn.q_norm.weight, net.blocks[0].attn.q_norm.weight)


def test_averaged_weights_or_those_of_the_last_step(tmp_path):
    """Of a checkpoint saved from under DDP and torch.compile."""
    ckpt = load_tensors(save_checkpoint(tmp_path / "x.pt", prefix="module._orig_mod."))
    last = {name: tensor + 0.1 if tensor.is_floating_point() else tensor for name,
            tensor in ckpt["ema"].items()}
    torch.save(ckpt | dict(model=last), tmp_path / "y.pt")
    for ema, saved in ((True, ckpt["ema"]), (False, last)):
        net = sample.load_checkpoint(tmp_path / "y.pt", ema=ema).sit
        assert torch.equal(net.x_embedder.proj.bias, saved["module._orig_mod.x_embedder.proj.bias"])


def test_checkpoint_of_a_vae_alone_is_not_sampled(tmp_path):
    ckpt = load_tensors(save_checkpoint(tmp_path / "x.pt", vae_only=True))
    torch.save(ckpt | dict(model={}, ema={}), tmp_path / "y.pt")
    sampler = sample.load_checkpoint(tmp_path / "y.pt")
    assert sampler.vae.stride == 4                                          # fid.py --reconstruct needs it
    with pytest.raises(UserError, match="trained with --vae-only: it has no SiT to sample from"):
        sample.sample_images(sampler, [0], [0])


@pytest.mark.parametrize("steps, decay, trained",
                         [(6931, 0.9999, "50.0%"), (6932, 0.9999, None), (30, 0.99, "26.0%")])
def test_average_of_few_steps_is_warned_of(steps, decay, trained):
    lines = []
    sample.warn_of_short_average(decay, steps, lines.append)
    assert [f"only {trained} of" in line for line in lines] == ([True] if trained else [])


# --- Labels -------------------------------------------------------------------------------------------------

def test_labels_are_equal_or_random():
    assert sample.choose_labels(5, [4, 2, 9]) == [4, 2, 9, 4, 2]
    assert sample.choose_labels(10, range(1000)) == list(range(0, 1000, 100))                 # few are spread
    labels = sample.choose_labels(600, range(3), "random", 5)
    assert all(150 < labels.count(k) < 250 for k in range(3)) and labels[:300] != labels[300:]
    assert labels[:8] == [2, 2, 1, 0, 1, 1, 2, 1]                           # as ever: the same for a seed


# --- The command --------------------------------------------------------------------------------------------

def arr_0(file):
    return np.load(file)["arr_0"]


def test_classes_are_taken_by_name_before_number(tmp_path, command):
    names = sorted(str(k) for k in range(12))                           # 0 1 10 11 2 3 ...: as folders sort
    for classes, words, labels in ((names, "2,9", [4, 11]), (["zebra", "cafe\u0301"], "caf\u00e9,0", [1, 0]),
                                 (None, "2,1", [2, 1])):                # None: an older one, of numbers alone
        ckpt = save_checkpoint(tmp_path / "x.pt", num_classes=len(classes or "123"), classes=classes)
        command("sample", "--ckpt", ckpt, "--num-samples", 2, "--classes", words, "--out", "y.npz", *FEW)
        expected = sample.sample_images(sample.load_checkpoint(ckpt), [0, 1], labels, num_steps=2)
        assert np.array_equal(arr_0(tmp_path / "y.npz"), expected.permute(0, 2, 3, 1).numpy())
    one_line(command("sample", "--ckpt", ckpt, "--classes", "1,cow", *FEW, code=2), "cow", "or of 0, 1, 2")


def test_three_kinds_of_output_hold_the_same_images(tmp_path, command, monkeypatch):
    ckpt = save_checkpoint(tmp_path / "x.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    for out in ("~/a/b/x.npz", tmp_path / "x.png", tmp_path / "folder"):
        printed = command("sample", "--ckpt", ckpt, "--num-samples", 6, "--batch-size", 4, "--out", out, *FEW)
        assert f"6 samples of {ckpt}, step 7, trained on some/images" in printed
    images = arr_0(tmp_path / "a/b/x.npz")
    sampler = sample.load_checkpoint(ckpt)
    expected = torch.cat([sample.sample_images(sampler, part, [k % 3 for k in part], num_steps=2)
                          for part in ([0, 1, 2, 3], [4, 5])])
    assert np.array_equal(images, expected.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(images, np.stack([Image.open(tmp_path / f"folder/{i:06d}.png") for i in range(6)]))
    grid = np.array(Image.open(tmp_path / "x.png"))                   # 6 columns of 32 pixels, doubled; gap 2
    for i in range(6):
        assert np.array_equal(grid[:64:2, 68 * i:68 * i + 64:2], images[i])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder", "x.png", "x.pt"]
    one_line(command("sample", "--ckpt", ckpt, "--out", "folder", *FEW, code=2), "this folder exists")
    one_line(command("sample", "--ckpt", ckpt, "--out", "x.JPG", *FEW, code=2), "write a .png, a .npz or a folder")
    command("sample", "--ckpt", ckpt, "--num-samples", 2, *FEW)
    assert (tmp_path / "samples-x.png").is_file()                     # beside a file that is in no run's folder


def test_full_disk_shows_before_any_sampling(tmp_path, command, monkeypatch):
    ckpt, asked = save_checkpoint(tmp_path / "x.pt"), []

    def fallocate(descriptor, offset, size):
        asked.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fallocate, raising=False)
    monkeypatch.setattr(sample, "sample_images", None)
    one_line(command("sample", "--ckpt", ckpt, "--num-samples", 3, "--out", "x.npz", *FEW, code=2),
             "No space left")
    assert asked[0] >= 3 * 32 * 32 * 3 and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_samples_that_are_not_finite_are_refused(tmp_path, command):
    ckpt = load_tensors(save_checkpoint(tmp_path / "x.pt"))
    ckpt["ema"] = {name: tensor * 1e38 if name == "final_layer.linear.weight" else tensor
                   for name, tensor in ckpt["ema"].items()}
    torch.save(ckpt, tmp_path / "y.pt")
    printed = command("sample", "--ckpt", "y.pt", "--num-samples", 3, "--out", "x.npz", *FEW, code=2)
    one_line(printed, "sample 0 is not finite (3 of a batch of 3)")
    assert not (tmp_path / "x.npz").exists()


def test_failure_while_sampling_leaves_no_file(tmp_path, command, monkeypatch):
    """And keeps its traceback. The network runs with TF32."""
    ckpt, sample_images, tf32 = save_checkpoint(tmp_path / "x.pt"), sample.sample_images, []

    def second_batch_fails(sampler, indices, labels, **settings):
        tf32.extend((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        if 4 in indices:
            raise RuntimeError("a bug")
        return sample_images(sampler, indices, labels, **settings)

    monkeypatch.setattr(sample, "sample_images", second_batch_fails)
    with pytest.raises(RuntimeError, match="a bug"):
        command("sample", "--ckpt", ckpt, "--num-samples", 6, "--batch-size", 4, "--out", "x.npz", *FEW)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"] and all(tf32)


def test_columns_of_a_grid_are_classes(tmp_path, command, monkeypatch):
    ckpt = save_checkpoint(tmp_path / "run/checkpoints/0000007.pt", num_classes=3,
                           classes=["cat", "dog", "ox"])
    printed = command("sample", "--ckpt", ckpt, "--batch-size", 5, *FEW)
    assert "first row: cat, dog, ox, cat, dog, ox\n" in printed and "24 samples of" in printed
    assert Image.open(tmp_path / "run/samples-0000007.png").size == ((6 * 34 - 2) * 2, (4 * 34 - 2) * 2)
    ckpt = save_checkpoint(tmp_path / "many.pt", num_classes=40)
    sampler = sample.load_checkpoint(ckpt)                               # train.py's grid: 8 rows, 10 columns
    monkeypatch.setattr(sample, "sample_images", lambda sampler, indices, labels, **settings: torch.tensor(
        labels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32))
    sample.save_sample_grid(sampler, tmp_path / "grids/grid.png", 1.0, "no")
    grid = np.array(Image.open(tmp_path / "grids/grid.png"))
    assert grid.shape == ((8 * 34 - 2) * 2, (10 * 34 - 2) * 2, 3)
    assert grid[::68, ::68, 0].tolist() == [[*range(10)]] * 8


def test_guidance_needs_classes_and_a_null_class(tmp_path):
    for num_classes, cfg_prob in ((1, 0.1), (3, 0.0)):
        sampler = sample.load_checkpoint(save_checkpoint(tmp_path / "x.pt", num_classes, cfg_prob))
        with pytest.raises(UserError, match="--cfg-scale above 1"):
            sample.sample_images(sampler, [0], [0], num_steps=1, cfg_scale=1.5)
        sample.sample_images(sampler, [0], [0], num_steps=1)


@pytest.mark.parametrize("flags",
                         ["--cfg-scale 0.5", "--guidance-low 0.9 --guidance-high 0.1", "--heun --mode sde"])
def test_sampler_flags_that_do_not_go_together(command, flags):
    one_line(command("sample", "--device", "cpu", *flags.split(), code=2), flags.split()[0])
