"""Samplers against closed forms and steps by hand; images written out; labels."""
import itertools
import math

import numpy as np
import pytest
import torch

import sample
from conftest import CPU, statistics

MEAN, STD = 1.5, 0.5                                                    # data ~ N(MEAN, STD^2)


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


def test_labels_are_equal_or_random():
    assert [sample.label_of(i, 0, range(3)) for i in range(5)] == [0, 1, 2, 0, 1]
    assert [sample.label_of(i, 0, [4, 2]) for i in range(3)] == [4, 2, 4]
    drawn = np.array([sample.label_of(i, 0, [4, 2], "random") for i in range(400)])
    assert set(drawn) == {2, 4} and abs((drawn == 2).mean() - 0.5) < 0.1 and (drawn[::2] != drawn[1::2]).any()
