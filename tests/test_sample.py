"""sample.py: samplers against closed forms and steps by hand; checkpoints, labels, files."""
import argparse
import errno
import io
import itertools
import math
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import repa
import sample
import sit
import vae
from conftest import CPU, statistics
from support.checkpoints import read_checkpoint
from support.commands import UserError, run_command
from support.files import load_tensors

MEAN, STD = 1.5, 0.5                                                    # data ~ N(MEAN, STD^2)


# --- Samplers ---------------------------------------------------------------------------------------------------------

def coefficients(t, path_type):
    """alpha, sigma and their derivatives at t, numbers."""
    if path_type == "linear":
        return 1 - t, t, -1, 1
    quarter, angle = math.pi / 2, math.pi / 2 * t
    return math.cos(angle), math.sin(angle), -quarter * math.sin(angle), quarter * math.cos(angle)


def gaussian_velocity(path_type):
    """E[velocity | x_t] for Gaussian data, in closed form."""
    def velocity(x, t, start):
        a, s, da, ds = coefficients(t, path_type)
        return da * MEAN + (da * a * STD ** 2 + ds * s) / (a * a * STD ** 2 + s * s) * (x - a * MEAN)
    return velocity


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_ode_solvers_reach_the_closed_form_at_their_order(path_type):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    exact = MEAN + STD * x                                              # the flow of a Gaussian is affine
    for heun, order in ((False, 1), (True, 2)):
        ends = [sample.integrate(gaussian_velocity(path_type), x, "ode", n, heun, path_type) for n in (40, 80, 160)]
        errors = [(end - exact).abs().max().item() for end in ends]
        assert errors[-1] < 2e-2
        for coarse, fine in zip(errors, errors[1:]):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_sde_has_the_right_marginal_and_steps(path_type):
    g = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(40000, 1, 1, 1, generator=g, dtype=torch.float64)

    x = sample.integrate(gaussian_velocity(path_type), draw(), "sde", 250, False, path_type, draw)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02) and x.std().item() == pytest.approx(STD, abs=0.02)
    noises = [draw()[:5] for _ in range(3)]  # Euler-Maruyama by hand: x, then two with noise
    x, velocity = noises[0], gaussian_velocity(path_type)
    for t, s, noise in ((1.0, 0.52, noises[1]), (0.52, 0.04, noises[2]), (0.04, 0.0, 0.0)):
        v = velocity(x, t, t)
        if path_type == "linear":                                       # score = - E[eps | x_t] / sigma
            score = -(x + (1 - t) * v) / t
        else:
            a, b = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
            score = -(b * x + a * v * 2 / math.pi) / b
        x = x - (v - t * score) * (t - s) + math.sqrt(2 * t * (t - s)) * noise
    replay = iter(noises[1:])
    got = sample.integrate(velocity, noises[0], "sde", 3, False, path_type, lambda: next(replay))
    assert torch.allclose(got, x, atol=1e-9)


def test_time_grids():
    sde = sample.time_grid("sde", 250)
    assert len(sde) == 251 and sde[0] == 1 and sde[249] == pytest.approx(0.04) and sde[250] == 0
    assert sde[100] == pytest.approx(1 - 0.96 * 100 / 249)
    assert sample.time_grid("ode", 4) == [1, 0.75, 0.5, 0.25, 0]


def test_guidance(tiny):
    m, _, (_, y, _, noise, *_) = tiny()
    x, half = noise.double(), torch.full((len(y),), 0.5)
    with torch.no_grad():
        plain, null = (m.sit(noise, half, labels)[0].double() for labels in (y, torch.full_like(y, 10)))
        assert (plain - null).abs().max() > 0.1
        guided = sample.guided_velocity(m.sit, y, 3.0, 0.2, 0.6)
        assert torch.allclose(sample.guided_velocity(m.sit, y, 1.0)(x, 0.5, 0.5), plain)
        assert torch.allclose(guided(x, 0.5, 0.5), 3 * plain - 2 * null, atol=1e-4)
        assert torch.equal(guided(x, 0.5, 0.61), plain) and torch.equal(guided(x, 0.5, 0.19), plain)
        for edge in (0.2, 0.6):                                         # both ends in, by the step's start
            assert torch.allclose(guided(x, 0.5, edge), 3 * plain - 2 * null, atol=1e-4)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_images_written_out(tiny, path_type):
    """Heun with guidance, from each image's own noise in float64, decoded with the average's statistics."""
    m, cfg, _ = tiny("--path-type", path_type)
    m.ema.bn.start(*statistics(8))
    model = sample.Model(m.ema, m.vae, vars(cfg), 0, CPU)
    z = [np.random.default_rng((5, i)).standard_normal((8, 8, 8), np.float32) for i in (3, 11)]
    z = torch.from_numpy(np.stack(z)).double()
    times, y, null = [1, 0.75, 0.5, 0.25, 0], torch.tensor([3, 1]), torch.tensor([10, 10])

    def velocity(z, t, guided):
        t = torch.full((2,), t)
        v = m.ema(z.float(), t, y)[0].double()
        if guided:
            v_null = m.ema(z.float(), t, null)[0].double()
            v = v_null + 2.5 * (v - v_null)
        return v

    with torch.no_grad():
        for t, s in zip(times, times[1:]):
            guided = 0.25 <= t <= 0.8  # by the step's start, so 0.25 -> 0 as well
            v = velocity(z, t, guided)
            z = z + (s - t) * (v if s == 0 else (v + velocity(z + (s - t) * v, s, guided)) / 2)
        mean, std = (value.view(1, 8, 1, 1) for value in statistics(8))
        images = ((m.vae.decode(z.float() * std + mean) + 1) * 127.5).round().clamp(0, 255)
    settings = dict(num_steps=4, heun=True, cfg_scale=2.5, guidance_low=0.25, guidance_high=0.8, seed=5)
    got = sample.sample_images(model, [3, 11], **settings)
    assert got.dtype == torch.uint8 and (got - images).abs().max() <= 1 and (got == images).float().mean() > 0.95
    assert images.std() > 5
    rngs = [np.random.default_rng((5, i)) for i in (3, 11)]  # the SDE: first the state, then each step's noise
    z = torch.from_numpy(np.stack([rng.standard_normal((8, 8, 8), np.float32) for rng in rngs])).double()
    with torch.no_grad():
        for t, s in ((1.0, 0.52), (0.52, 0.04), (0.04, 0.0)):
            v, (a, b, da, db) = velocity(z, t, False), coefficients(t, path_type)
            score = (a * v - da * z) / (b * (da * b - db * a))          # eps = (a v - da x) / (a db - da b)
            z = z - (v - t * score) * (t - s)
            if s > 0:
                noise = torch.from_numpy(np.stack([rng.standard_normal((8, 8, 8)) for rng in rngs]))
                z = z + math.sqrt(2 * t * (t - s)) * noise
        images = ((m.vae.decode(z.float() * std + mean) + 1) * 127.5).round().clamp(0, 255)
    got = sample.sample_images(model, [3, 11], num_steps=3, mode="sde", seed=5)
    assert (got - images).abs().max() <= 1 and (got == images).float().mean() > 0.95
    for mode in ("ode", "sde"):  # an image depends on seed and index alone
        settings |= dict(mode=mode, heun=False)
        together = sample.sample_images(model, [0, 1, 7, 12], **settings)
        apart = torch.cat([sample.sample_images(model, [i], **settings) for i in (0, 1, 7, 12)])
        assert (together.int() - apart.int()).abs().max() <= 1
        assert all((a.int() - b.int()).abs().max() > 1 for a, b in itertools.combinations(together, 2))


# --- Checkpoints ------------------------------------------------------------------------------------------------------

def save_checkpoint(file, num_classes=3, cfg_prob=0.1, prefix="", **args):
    """A training checkpoint of random weights, every gate open: 32 pixels, 8x8 latents."""
    torch.manual_seed(0)
    net, autoencoder = sit.SiT("SiT-T/2", 8, 8, num_classes, cfg_prob, encoder_depth=1), vae.AutoencoderKL("f4d8")
    for name, p in net.named_parameters():
        if "adaLN" in name or "final_layer.linear" in name:
            torch.nn.init.normal_(p, 0, 0.05)
        elif "embedding_table" in name:
            torch.nn.init.normal_(p, 0, 1)                            # so that a label shows in the picture
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    args = dict(num_classes=num_classes, cfg_prob=cfg_prob, path_type="linear", data_dir="some/pictures",
                ema_decay=0.5) | args
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(model=state, ema=state, vae=autoencoder.state_dict(), args=args, steps=7), file)
    return file


def release(short_run, file, **changes):
    """One of our checkpoints in the form of the authors' release, written to `file`."""
    ckpt = load_tensors(short_run / "exps/a/checkpoints/0000004.pt")
    args = {k: ckpt["args"][k] for k in ("model", "vae", "resolution", "cfg_prob", "path_type", "encoder_depth")}
    ckpt |= dict(args=argparse.Namespace(**args)) | changes
    torch.save({k: v for k, v in ckpt.items() if v is not None}, file)
    return ckpt


def test_released_checkpoints_draw(short_run, tmp_path):
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
    images = [sample.sample_images(model, range(4), num_steps=3) for model in (own, first, bare, second)]
    assert all((images[0].int() - other.int()).abs().max() <= 1 for other in images[1:])
    assert own.args["resolution"] == second.args["resolution"] == 32 and bare.sit.null_class == 2

    with pytest.raises(UserError, match="no VAE in this checkpoint, it was frozen"):
        sample.load_checkpoint(tmp_path / "second.pt")
    (tmp_path / "tuned-latents-stats.pt").unlink()
    with pytest.raises(UserError, match="no latent statistics"):
        sample.load_checkpoint(tmp_path / "second.pt", vae_ckpt=tmp_path / "tuned.pt")
    with pytest.raises(UserError, match="SiT draws 8 channels, the VAE has 4"):
        with_vae = vae.AutoencoderKL("f8d4").state_dict()
        torch.save(with_vae, tmp_path / "f8d4.pt")
        sample.load_checkpoint(tmp_path / "second.pt", vae_ckpt=tmp_path / "f8d4.pt")


def test_qk_norm_and_sizes_come_from_the_tensors(tmp_path, short_run):
    torch.manual_seed(0)
    net = sit.SiT("SiT-S/2", 8, 8, 7, qk_norm=True, projectors=[repa.projector("mlp", 384, 16)])
    state = net.state_dict()
    release(short_run, tmp_path / "s2.pt", args=argparse.Namespace(), model=state, ema=state)
    model = sample.load_checkpoint(tmp_path / "s2.pt")
    assert model.sit.num_classes == 7 and model.sit.patch == 2 and model.args["resolution"] == 32
    assert torch.equal(model.sit.blocks[0].attn.q_norm.weight, net.blocks[0].attn.q_norm.weight)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoints_saved_from_under_ddp_or_compile_draw(tmp_path, prefix):
    bare = sample.load_checkpoint(save_checkpoint(tmp_path / "bare.pt"))
    ckpt = save_checkpoint(tmp_path / "wrapped.pt", prefix=prefix)
    images = [sample.sample_images(model, [0, 1], num_steps=2) for model in (bare, sample.load_checkpoint(ckpt))]
    assert torch.equal(*images)
    assert set(read_checkpoint(ckpt)["model"]) == set(bare.sit.state_dict())


def test_averaged_weights_or_those_of_the_last_step(tmp_path, command):
    ckpt = load_tensors(save_checkpoint(tmp_path / "x.pt"))
    model = {name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in ckpt["ema"].items()}
    changed = dict(ema=ckpt | dict(ema=model), last=ckpt | dict(model=model))
    images = []
    for name, flag in (("ema", "--ema"), ("last", "--no-ema"), ("last", "--ema")):
        torch.save(changed[name], tmp_path / f"{name}.pt")
        out = tmp_path / f"{name}{flag}.npz"
        assert command("--ckpt", tmp_path / f"{name}.pt", "--num-samples", 3, flag, "--out", out)[0] == 0
        images.append(arr_0(out))
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


@pytest.mark.parametrize("steps, decay, flag, trained", [
    (30, 0.9999, "--ema", "0.3%"), (6931, None, "--ema", "50.0%"), (6932, None, "--ema", ""),
    (30, 0.99, "--ema", "26.0%"), (30, 0.97, "--ema", ""), (30, 0.9999, "--no-ema", "")])
def test_an_average_of_few_steps_is_warned_of(tmp_path, command, steps, decay, flag, trained):
    ckpt = load_tensors(save_checkpoint(tmp_path / "x.pt")) | dict(steps=steps)
    del ckpt["args"]["ema_decay"]
    ckpt["args"] |= {} if decay is None else dict(ema_decay=decay)
    torch.save(ckpt, tmp_path / "y.pt")
    _, printed = command("--ckpt", tmp_path / "y.pt", "--num-samples", 1, flag, "--out", tmp_path / "x.png")
    assert ("--no-ema" in printed) == bool(trained) and f"only {trained}" * bool(trained) in printed


# --- Labels -----------------------------------------------------------------------------------------------------------

def test_labels_are_equal_or_random():
    assert [sample.label_of(i, 0, range(3)) for i in range(5)] == [0, 1, 2, 0, 1]
    assert [sample.label_of(i, 0, [4, 2]) for i in range(3)] == [4, 2, 4]
    drawn = np.array([sample.label_of(i, 0, [4, 2], "random") for i in range(400)])
    assert set(drawn) == {2, 4} and abs((drawn == 2).mean() - 0.5) < 0.1 and (drawn[::2] != drawn[1::2]).any()


def test_few_samples_are_spread_over_the_classes():
    labels = [sample.label_of(i, 0, range(1000), n=10) for i in range(10)]
    assert labels == list(range(0, 1000, 100))
    assert [sample.label_of(i, 0, [4, 2, 9], n=2) for i in range(2)] == [4, 2]
    assert [sample.label_of(i, 0, range(3), n=7) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [sample.label_of(i, 0, range(3), n=3) for i in range(3)] == [0, 1, 2]
    drawn = [sample.label_of(i, 5, range(3), "random") for i in range(600)]
    assert drawn == [sample.label_of(i, 5, range(3), "random", n=2) for i in range(600)]
    assert all(150 < drawn.count(label) < 250 for label in range(3))


# --- The command ------------------------------------------------------------------------------------------------------

@pytest.fixture
def command(monkeypatch, capsys):
    """Runs sample.py here; returns (exit code, what it printed)."""
    def run(*flags):
        usual = ["sample.py", "--device", "cpu", "--mixed-precision", "no", "--num-steps", "2"]
        monkeypatch.setattr(sys, "argv", [*usual, *map(str, flags)])
        code = 0
        try:
            run_command(sample.main)
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out + "".join(f"{line}\n" for line in err.splitlines() if line.strip() and "sampling" not in line)

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield run
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def arr_0(file):
    return np.load(file)["arr_0"]


def test_classes_are_taken_by_name_before_number(tmp_path, command):
    names = sorted(str(k) for k in range(12))                           # 0 1 10 11 2 3 ...: as folders sort
    ckpt = save_checkpoint(tmp_path / "x.pt", num_classes=12, classes=names)
    model = sample.load_checkpoint(ckpt)
    assert model.args["classes"] == names

    def drawn(classes, *flags):
        code, printed = command("--ckpt", ckpt, "--num-samples", 2, "--classes", classes, "--out", tmp_path / "y.npz")
        assert code == 0, printed
        return arr_0(tmp_path / "y.npz"), printed

    def expected(*labels):
        return sample.sample_images(model, [0, 1], labels, num_steps=2).permute(0, 2, 3, 1).numpy()

    assert not np.array_equal(expected(4, 4), expected(2, 2))
    images, printed = drawn("2")                                        # folder "2" is label 4
    assert np.array_equal(images, expected(4, 4)) and "2 samples (2) of" in printed
    images, printed = drawn("10,9")
    assert np.array_equal(images, expected(2, 11)) and "2 samples (10, 9) of" in printed

    ckpt = save_checkpoint(tmp_path / "x.pt", num_classes=3, classes=["cat", "dog", "zebra"])
    model = sample.load_checkpoint(ckpt)
    images, printed = drawn("zebra,0")
    assert np.array_equal(images, expected(2, 0)) and "(zebra, cat)" in printed
    for wrong in ("3", "cow", "-1", "cat;dog"):
        code, printed = command("--ckpt", ckpt, f"--classes={wrong}")
        assert code == 2 and wrong in printed and "cat, dog, zebra" in printed and len(printed.splitlines()) == 1

    ckpt = save_checkpoint(tmp_path / "x.pt", num_classes=3)            # an older one: numbers alone
    model = sample.load_checkpoint(ckpt)
    assert np.array_equal(drawn("2,1")[0], expected(2, 1))
    assert command("--ckpt", ckpt, "--classes", "cat")[0] == 2


def test_the_three_kinds_of_output_hold_the_same_images(tmp_path, command, monkeypatch):
    ckpt = save_checkpoint(tmp_path / "x.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    for out in ("~/a/b/x.npz", tmp_path / "x.png", tmp_path / "folder"):
        code, printed = command("--ckpt", ckpt, "--num-samples", 6, "--batch-size", 4, "--out", out)
        assert code == 0 and f"6 samples (3 classes) of {ckpt}, step 7, trained on some/pictures" in printed
    images = arr_0(tmp_path / "a/b/x.npz")
    plain = io.BytesIO()
    np.savez(plain, arr_0=images)
    assert plain.getvalue() == (tmp_path / "a/b/x.npz").read_bytes()          # what np.savez would have written
    model = sample.load_checkpoint(ckpt)
    drawn = torch.cat([sample.sample_images(model, part, num_steps=2) for part in ([0, 1, 2, 3], [4, 5])])
    assert np.array_equal(images, drawn.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(images, np.stack([Image.open(tmp_path / f"folder/{i:06d}.png") for i in range(6)]))
    grid = np.array(Image.open(tmp_path / "x.png"))                    # 6 columns of 32 pixels, doubled; gap 2
    for i in range(6):
        assert np.array_equal(grid[:64:2, 68 * i:68 * i + 64:2], images[i])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder", "x.png", "x.pt"]
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["x.npz"]
    for out in ("folder", "a"):                                         # pictures there; a folder, not a file
        code, printed = command("--ckpt", ckpt, "--out", tmp_path / (out if out == "folder" else "d.npz"))
        (tmp_path / "d.npz").unlink(missing_ok=True)
        assert code == (2 if out == "folder" else 0), printed
    (tmp_path / "e.npz").mkdir()
    code, printed = command("--ckpt", ckpt, "--out", tmp_path / "e.npz")
    assert code == 2 and "this folder exists" in printed and len(printed.splitlines()) == 1


def test_a_full_disk_shows_before_anything_is_drawn(tmp_path, command, monkeypatch):
    ckpt, asked = save_checkpoint(tmp_path / "x.pt"), []

    def full(descriptor, offset, size):
        asked.append(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sample, "sample_images", None)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    code, printed = command("--ckpt", ckpt, "--num-samples", 50, "--out", tmp_path / "x.npz")
    assert code == 2 and "No space left on device" in printed and len(printed.splitlines()) == 1
    assert asked[0] >= 50 * 32 * 32 * 3 and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("code, runs", [(errno.EOPNOTSUPP, True), (errno.EINVAL, True), (errno.EIO, False)])
def test_file_systems_without_fallocate(tmp_path, command, monkeypatch, code, runs):
    def fallocate(descriptor, offset, size):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fallocate, raising=False)
    command("--ckpt", save_checkpoint(tmp_path / "x.pt"), "--num-samples", 1, "--out", tmp_path / "x.npz")
    assert (tmp_path / "x.npz").exists() == runs


@pytest.mark.parametrize("out", ["x.npz", "x.png"])
def test_samples_that_are_not_finite_are_refused(tmp_path, command, out):
    ckpt = load_tensors(save_checkpoint(tmp_path / "x.pt"))
    ckpt["ema"] = {name: tensor * 1e38 if name == "final_layer.linear.weight" else tensor
                   for name, tensor in ckpt["ema"].items()}
    torch.save(ckpt, tmp_path / "y.pt")
    code, printed = command("--ckpt", tmp_path / "y.pt", "--num-samples", 3, "--out", tmp_path / out)
    assert code == 2 and "sample 0 is not finite (of its batch, 3 of 3)" in printed, printed
    assert len(printed.splitlines()) == 1 and not (tmp_path / out).exists()


def test_a_failure_while_drawing_leaves_no_file_and_keeps_its_traceback(tmp_path, command, monkeypatch):
    ckpt, draw = save_checkpoint(tmp_path / "x.pt"), sample.sample_images

    def second_batch_fails(model, indices, labels, **settings):
        if 4 in indices:
            raise RuntimeError("a bug")
        return draw(model, indices, labels, **settings)

    monkeypatch.setattr(sample, "sample_images", second_batch_fails)
    for out in ("x.npz", "x.png"):
        with pytest.raises(RuntimeError, match="a bug"):
            command("--ckpt", ckpt, "--num-samples", 6, "--batch-size", 4, "--out", tmp_path / out)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_a_grid_says_which_column_is_which_class(tmp_path, command):
    ckpt = save_checkpoint(tmp_path / "run/checkpoints/0000007.pt", num_classes=3, classes=["cat", "dog", "ox"])
    code, printed = command("--ckpt", ckpt, "--batch-size", 5)
    assert code == 0 and "columns: cat, dog, ox, cat, dog, ox\n" in printed
    assert f"24 samples (3 classes) of {ckpt}" in printed
    grid = Image.open(tmp_path / "run/samples-0000007.png")
    assert grid.size == ((6 * 34 - 2) * 2, (4 * 34 - 2) * 2)
    code, printed = command("--ckpt", ckpt, "--classes", "ox", "--num-samples", 2)
    assert "columns: ox, ox\n" in printed and "2 samples (ox) of" in printed
    ckpt = save_checkpoint(tmp_path / "many.pt", num_classes=40)
    code, printed = command("--ckpt", ckpt, "--num-samples", 4, "--out", tmp_path / "few.png")
    assert "first row: 0, 10, 20, 30\n" in printed


def test_guidance_is_refused_where_there_is_nothing_to_guide_to(tmp_path, command):
    for num_classes, cfg_prob in ((1, 0.1), (3, 0.0)):
        ckpt = save_checkpoint(tmp_path / "x.pt", num_classes=num_classes, cfg_prob=cfg_prob)
        code, printed = command("--ckpt", ckpt, "--cfg-scale", 1.5, "--out", tmp_path / "x.npz")
        assert code == 2 and "--cfg-scale above 1" in printed and len(printed.splitlines()) == 1
        assert command("--ckpt", ckpt, "--num-samples", 2, "--out", tmp_path / "x.npz")[0] == 0
        (tmp_path / "x.npz").unlink()


def test_sampling_uses_tf32_where_there_is_one(tmp_path, command):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    command("--ckpt", save_checkpoint(tmp_path / "x.pt"), "--num-samples", 1)
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("flags", ["--num-steps 0", "--num-samples 0", "--batch-size -1", "--seed -1",
                                   "--seed 18446744073709551616",
                                   "--cfg-scale 0.5", "--cfg-scale nan", "--guidance-high 1.5", "--ckpt nowhere.pt",
                                   "--guidance-low 0.9 --guidance-high 0.1", "--mode sde --heun"])
def test_wrong_flags_are_one_line(command, flags):
    code, printed = command(*flags.split())
    assert code == 2 and flags.split()[0] in printed.replace("--heun", "--mode sde") and len(printed.splitlines()) == 1
