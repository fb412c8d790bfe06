"""experiments/: the numbers, charts and shell scripts."""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sit
import train
import vae
from conftest import ROOT, needs, one_line, run, save_checkpoint, smooth_images
from data.images import list_images, read_image
from experiments import analyze, compare, curves, figures
from support.commands import UserError
from support.grids import to_float, to_uint8

LITE0 = "efficientnet-lite0"


@needs("matplotlib")
def test_scripts_run_from_anywhere_and_fail_in_one_line(tmp_path):
    one_line(run(sys.executable, ROOT / "experiments/curves.py", "nowhere", cwd=tmp_path, code=2),
             "nowhere: no such")
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        figures.load_matplotlib()


# --- alignment ----------------------------------------------------------------------------------------------

def test_cknna_equals_its_definition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 6)), rng.normal(size=(40, 9))
    b[:, :6] += a
    n, k = len(a), 5

    def kernel_and_neighbours(f):
        f = f / np.linalg.norm(f, axis=1, keepdims=True)
        x = f @ f.T
        return x, [set(sorted((j for j in range(n) if j != i), key=lambda j: -x[i, j])[:k]) for i in range(n)]

    def hsic(x, nx, y, ny):                                  # Song et al. 2012, eq. 5
        mask = np.array([[j in nx[i] and j in ny[i] for j in range(n)] for i in range(n)])
        x, y, one = x * mask, y * mask, np.ones(n)
        total = (one @ x @ one) * (one @ y @ one) / ((n - 1) * (n - 2))
        return (np.trace(x @ y) + total - 2 / (n - 2) * one @ x @ y @ one) / (n * (n - 3))

    x, y = kernel_and_neighbours(a), kernel_and_neighbours(b)
    expected = hsic(*x, *y) / math.sqrt(hsic(*x, *x) * hsic(*y, *y))
    assert analyze.cknna(torch.tensor(a), torch.tensor(b), k) == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of 12 images, 32 x 32, smooth so that their features differ."""
    folder = tmp_path_factory.mktemp("images")
    for k, image in enumerate(smooth_images(24, 32)):
        file = folder / ("one", "two words")[k // 12] / f"{k:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(file)
    return folder


@pytest.fixture(scope="module")
def checkpoint(images, tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("exps") / "repa/checkpoints/0000004.pt", enc_type=LITE0,
                           encoder_depth=2, val_dir=str(images), classes=["extra", "two words", "one"],
                           path_type="cosine")


def copy_with_args(checkpoint, file, **args):
    ckpt = torch.load(checkpoint, weights_only=True)
    torch.save(ckpt | dict(args=ckpt["args"] | args), file)
    return file


@torch.no_grad()
def test_evaluate_measures_cknna_and_denoising_loss(checkpoint, images, call):
    """Compared with the same quantities computed here, all images in one batch, blocks run one by one."""
    call(analyze.main, "evaluate", checkpoint, "--device", "cpu")
    record = json.loads((checkpoint.parents[1] / "evaluation-0000004.json").read_text())
    assert record["images"] == 24 and record["encoder"] == LITE0

    net = sit.SiT("SiT-T/2", 8, 8, num_classes=3, encoder_depth=6).eval()
    net.load_state_dict(torch.load(checkpoint, weights_only=True)["ema"])
    autoencoder, _ = vae.load_vae(checkpoint)
    x = torch.stack([to_float(read_image(file)) for file in list_images(images)])
    y = torch.tensor([2] * 12 + [1] * 12)                                 # by name, in the checkpoint's order
    noise = np.stack([np.random.default_rng(i).standard_normal((2, 8, 8, 8), np.float32) for i in range(24)])
    noise, eps = torch.tensor(noise).unbind(1)
    posterior = autoencoder.encode(x)
    z = posterior.mean + (0.5 * posterior.logvar).exp() * noise
    z = (z - net.bn.running_mean.view(8, 1, 1)) / (net.bn.running_var.view(8, 1, 1) + 1e-4).sqrt()
    assert list(record["denoising_loss"]) == [f"0.{k}" for k in range(1, 10)]
    for t, value in record["denoising_loss"].items():
        cos, sin = math.cos(math.pi / 2 * float(t)), math.sin(math.pi / 2 * float(t))
        v = net(cos * z + sin * eps, torch.full((24,), float(t)), y)[0]
        error = v - math.pi / 2 * (cos * eps - sin * z)
        assert value == pytest.approx(error.square().mean().item(), rel=1e-4)

    features = analyze.PatchFeatures(LITE0, 4)(x).mean(1)
    h = net.x_embedder(math.sqrt(0.5) * (z + eps)) + net.pos_embed
    c = net.t_embedder(torch.full((24,), 0.5)) + net.y_embedder(y)
    for block, value in zip(net.blocks, record["cknna"], strict=True):
        h = block(h, c)
        assert value == pytest.approx(analyze.cknna(h.mean(1), features), abs=2e-3)


def test_evaluate_matches_classes_by_name(checkpoint, images, tmp_path, call):
    assert [label for _,
            label in analyze.labelled_images(images, ["two words", "x", "one"])] == [2] * 12 + [0] * 12
    assert [label for _, label in analyze.labelled_images(images, ["cats"])] == [0] * 24          # a single class
    older = copy_with_args(checkpoint, tmp_path / "a.pt", classes=None, data_dir=str(images))
    call(analyze.main, "evaluate", older)                                  # lists the training folder
    assert (tmp_path / "evaluation-a.json").is_file()
    for args, words in ((dict(classes=["one", "three"]), "class two words is none of those"),
                        (dict(classes=None, data_dir=None, val_dir=None), "does not name its data; give --data-dir"),
                        (dict(vae_only=True), "no SiT to evaluate")):
        with pytest.raises(UserError, match=words):
            call(analyze.main, "evaluate", copy_with_args(checkpoint, tmp_path / "b.pt", **args))
    assert not (tmp_path / "evaluation-b.json").exists()


# --- VAEs ---------------------------------------------------------------------------------------------------

@needs("matplotlib")
@torch.no_grad()
def test_latents_prints_the_spectrum(checkpoint, images, tmp_path, call):
    text = call(analyze.main, "latents", images, checkpoint, "--resolution", 32, "--out",
                tmp_path / "latents.png")
    autoencoder, _ = vae.load_vae(checkpoint)
    x = torch.stack([to_float(read_image(file)) for file in list_images(images)])
    moments = autoencoder.quant_conv(autoencoder.encoder(x)).permute(0, 2, 3, 1).reshape(-1, 16).numpy()
    flat, added = moments[:, :8], np.exp(moments[:, 8:]).mean(0) / moments[:, :8].var(0)
    fractions = np.linalg.eigvalsh(np.corrcoef(flat.T) * np.outer(flat.std(0),
                                                                  flat.std(0))) / flat.var(0).sum()
    assert (f"variance {flat.var(0).mean():.4g}, {1 / np.square(fractions).sum():.2f} effective dimensions of 8; "
            f"sampling adds {added.mean():.2%}\n24 images") in text
    assert Image.open(tmp_path / "latents.png").width > 1000


@torch.no_grad()
def test_noise_changes_nothing_but_the_posteriors_standard_deviation(checkpoint, images, tmp_path, call):
    """To the share of another VAE, averaged over channels; latent statistics follow."""
    def moments(file):
        autoencoder, stats = vae.load_vae(file)
        x = torch.stack([to_float(read_image(path)) for path in list_images(images)])
        mean, logvar = autoencoder.quant_conv(autoencoder.encoder(x)).chunk(2, 1)
        share = (logvar.exp().mean((0, 2, 3)) / mean.var((0, 2, 3), correction=0)).mean()
        return autoencoder.state_dict(), mean, logvar, share, stats[1].square()

    other = torch.load(checkpoint, weights_only=True)
    other["vae"]["quant_conv.weight"][:8] *= 0.5                           # half the latents: four times the share
    other["vae"]["quant_conv.bias"][:8] *= 0.5
    torch.save(other, tmp_path / "other.pt")
    call(analyze.main, "noise", images, checkpoint, tmp_path / "other.pt", "--resolution", 32, "--out",
         tmp_path / "new.pt")
    before, mean, logvar, share, variance = moments(checkpoint)
    after, new_mean, new_logvar, new_share, new_variance = moments(tmp_path / "new.pt")
    assert {name for name, t in before.items() if not torch.equal(t, after[name])} == {"quant_conv.bias"}
    assert torch.equal(mean, new_mean) and new_share.item() == pytest.approx(4 * share.item(), rel=1e-4)
    assert torch.allclose(new_logvar, logvar + math.log(4), atol=1e-4)
    assert torch.allclose(new_variance - variance, 3 * logvar.exp().mean((0, 2, 3)), atol=1e-4)


@torch.no_grad()
def test_reconstruct_prints_psnr_and_draws_pairs(checkpoint, images, tmp_path, call):
    out = call(analyze.main, "reconstruct", checkpoint, images, "--resolution", 32, "--out",
               tmp_path / "r.png",
               "--vgg-ckpt", "nowhere")
    autoencoder, _ = vae.load_vae(checkpoint)
    x = torch.stack([read_image(file) for file in list_images(images)])
    y = to_uint8(autoencoder.decode(autoencoder.encode(to_float(x)).mean))
    mse = ((x.double() - y.double()) / 255).square().mean((1, 2, 3))
    values = {line.split()[0]: float(line.split()[1]) for line in out.splitlines() if line.startswith("  ")}
    assert values == {"PSNR": pytest.approx((-10 * mse.log10()).mean().item(), abs=0.01),
                      "SSIM": pytest.approx(vae.ssim(to_float(x), to_float(y)).mean().item(), abs=1e-3)}
    assert "no LPIPS: " in out
    pairs = np.asarray(Image.open(tmp_path / "r.png"))[::2, ::2]             # 4 pairs per row, doubled; gap 2
    assert np.array_equal(pairs[34:66, :32], x[4].permute(1, 2, 0))
    assert np.allclose(pairs[34:66, 34:66], y[4].permute(1, 2, 0), atol=1)
    np.savez(tmp_path / "36.npz", arr_0=np.zeros((2, 36, 36, 3), np.uint8))
    with pytest.raises(UserError, match="no images of 32x32 pixels"):
        call(analyze.main, "reconstruct", checkpoint, tmp_path / "36.npz", "--resolution", 32)


# --- charts -------------------------------------------------------------------------------------------------

def write_metrics(run, *rows):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_runs_of_equal_names_are_told_apart():
    assert figures.run_names(["exps/a/", "b"]) == ["a", "b"]
    assert figures.run_names(["tour/a", "longer/a"]) == ["tour/a", "longer/a"]


@needs("matplotlib")
def test_curves_and_table_of_runs(tmp_path, call):
    first = write_metrics(tmp_path / "a", *(dict(step=k, l1_loss=1 / k, skipped=0) for k in range(1, 40)))
    second = write_metrics(tmp_path / "b", dict(step=5, l1_loss=0.5, loss=math.nan), dict(step=9, loss=-1.5))
    assert curves.read_metrics(second) == {"l1_loss": {5: 0.5}, "loss": {9: -1.5}}
    out = tmp_path / "curves.svg"
    assert "2 runs, 2 metrics" in call(curves.main, first, second, "--out", out) and "<svg" in out.read_text()
    write_metrics(second, *(dict(step=50 * k, loss=k) | ({"val_psnr": 20 + k / 10} if k % 6 == 0 else {})
                            for k in range(1, 25)))
    assert call(curves.main, second, "--table", "--out", out).splitlines()[2:9] == [
        "| step | loss | val_psnr |", "|---|---|---|", "| 250 | 5 |  |", "| 500 | 10 |  |",
        "| 700 | 14 |  |", "| 950 | 19 |  |", "| 1,200 | 24 | 22.4 |"]
    (second / "metrics.jsonl").write_text('{"step": 2, "lo')
    with pytest.raises(UserError, match="no metrics"):
        curves.read_metrics(second)


def write_run(run, distances, last, cknna, psnr):
    """Results as evaluate.py and analyze.py write them: `distances` at steps 100, 200, ..., `last` to
    reconstructions."""
    run.mkdir(parents=True)
    fd = {str(100 * k): value for k, value in enumerate(distances, 1)}
    record = dict(features="net", samples=2000, fd=fd, fd_to_reconstructions=last, rfd=50.04, psnr=psnr)
    (run / "fd.json").write_text(json.dumps(record))
    (run / f"evaluation-{100 * len(distances):07d}.json").write_text(json.dumps(dict(cknna=[0.5, cknna,
                                                                                            0.6])))
    (run / "args.json").write_text(json.dumps(dict(encoder_depth=2)))


@needs("matplotlib")
def test_comparison_table(tmp_path, call):
    write_run(tmp_path / "repa-1", [600, 500, 410], 390, 0.2, 27)
    write_run(tmp_path / "repa-2", [610, 500, 390], 400, 0.3, 28)
    write_run(tmp_path / "repae-1", [500, 420, 320], 300, 0.4, 26)
    write_run(tmp_path / "sit-2", [700, 600, 500], 480, 0.1, 27)
    write_run(tmp_path / "naive-1", [900, 800], 700, 0.1, 20)                                # unfinished
    lines = call(compare.main, tmp_path, "--seeds", 1, 2).splitlines()
    assert lines[0] == ("| | seeds | FD, 100 steps | FD, 200 steps | FD, 300 steps | FD to reconstructions | CKNNA | "
                        "rFD | rPSNR, dB |")
    rows = ("| SiT (`sit`) | 1 | 700.0 | 600.0 | 500.0 | 480.0 | 0.100 | 50.0 | 27.00 |",
            "| REPA (`repa`) | 2 | 605.0 (600.0-610.0) | 500.0 | 400.0 (390.0-410.0) | 395.0 (390.0-400.0) | "
            "0.250 (0.200-0.300) | 50.0 | 27.50 (27.00-28.00) |",
            "| REPA-E (`repae`) | 1 | 500.0 | 420.0 | 320.0 | 300.0 | 0.400 | 50.0 | 26.00 |")
    assert tuple(lines[2:5]) == rows
    text = "\n".join(lines[5:])
    assert "FD: Frechet distance of 2,000 samples over net." in text and "left out: naive-1." in text
    assert "REPA ends at 400 after 300 steps. REPA-E reaches it after 220." in text
    assert "SiT ends at 500 after 300 steps. REPA-E reaches it after at most 100." in text
    assert Image.open(tmp_path / "comparison.png").width > 600
    assert compare.steps_to_reach(199, [100, 200], [400, 200]) is None

    file = tmp_path / "repae-1/fd.json"
    fewer = file.read_text().replace("2000", "1000")
    for text, words in ((fewer, "numbers of samples"), ("{", "fd.json: damaged")):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            compare.read_runs(tmp_path, [1, 2])


# --- shell scripts ------------------------------------------------------------------------------------------

REGIMES = {                                                 # what differs from REPA-E
    "sit": dict(vae_grad="none", proj_coeff=0), "repa": dict(vae_grad="none"),
    "second": dict(vae_grad="none"),
    "control": dict(vae_grad="none"), "repae": {}, "naive": dict(vae_grad="diffusion"),
    "noalign": dict(vae_align_proj_coeff=0), "nonorm": dict(fixed_latent_stats=True),
    "scratch": dict(vae_from_scratch=True, vae_ckpt="", vae="f4d8"),
    "both": dict(vae_grad="both"), "irepa": dict(projector="conv", spatial_norm=0.6, proj_coeff=1),
    "lite0": dict(enc_type=LITE0), "weight": dict(vae_align_proj_coeff=1.5),
    "float32": dict(mixed_precision="no"), "fixed-noise": dict(vae_grad="diffusion", posterior_std=0.5),
    "fixed-noise-repae": dict(posterior_std=0.5), "gen-first-second": dict(vae_grad="none"),
    "gen-first": dict(vae_grad="diffusion", entropy_weight=5e-5, vae_denoising_coeff=0.1),
    "gen-first-repae": dict(entropy_weight=5e-5), "less-noise": dict(vae_grad="none"),
    "more-noise": dict(vae_grad="none"),
    "mse": dict(align_loss="mse", proj_coeff=0.1, vae_align_proj_coeff=0.1),
    "repa-mse": dict(vae_grad="none", align_loss="mse", proj_coeff=0.1),
    "mine": dict(qk_norm=True)}


@pytest.mark.skipif(os.name != "posix", reason="a bash script")
def test_regimes_differ_from_repae_in_their_flags_only():
    assert REGIMES.keys() == {*compare.REGIMES, *compare.OTHERS, *compare.ABLATIONS}
    for regime, different in REGIMES.items():
        script = f". experiments/common.sh; MINE=--qk-norm regime_flags {regime}"
        flags = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True,
                               text=True).stdout.split()
        vae_flags = [] if regime == "scratch" else ["--vae-ckpt", "vae.pt"]
        repae, settings = (vars(train.parse_config(["--data-dir", ".", "--vae-align-proj-coeff", "0.5",
                                                    *more]))
                           for more in (["--vae-ckpt", "vae.pt"], vae_flags + flags))
        assert settings == repae | different, regime


STUB = '''#!/usr/bin/env bash
# replaces python: logs each command and makes the files that it would make
echo "$*" >> "$LOG"
value() { while [ $# -gt 1 ]; do if [ "$1" = "$flag" ]; then last=$2; fi; shift; done; echo "$last"; }
case $1 in
    train.py)
        flag=--output-dir; out=$(value "$@"); flag=--exp-name; run=$out/$(value "$@")
        flag=--max-train-steps; steps=$(value "$@"); last=; flag=--vae-ckpt; vae=$(value "$@")
        [ -z "$vae" ] || [ -f "$vae" ] || exit 2
        case $run in *"$BREAKS") exit 0 ;; esac                          # as after Ctrl-C: stopped, and no error
        mkdir -p "$run/checkpoints"; echo > "$run/metrics.jsonl"
        touch "$run/checkpoints/$(printf %07d $((steps / 2))).pt" "$run/checkpoints/$(printf %07d $steps).pt" ;;
    experiments/evaluate.py)
        if [ "$2" = --floor ]; then echo real; else touch "$2/fd.json"; fi ;;
    experiments/analyze.py)
        case $2 in
            noise) flag=--out; touch "$(value "$@")" ;;
            evaluate) touch "${3%/checkpoints/*}/evaluation-$(basename "$3" .pt).json" ;;
        esac ;;
esac
'''


@pytest.mark.skipif(os.name != "posix", reason="a bash script")
def test_compare_sh_trains_each_run_once(tmp_path):
    """With python replaced: the commands it runs; rerun, it resumes what was stopped and repeats nothing."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(STUB)
    (tmp_path / "bin/python").chmod(0o755)
    (tmp_path / "data").mkdir()
    out, log = tmp_path / "out", tmp_path / "log"

    def start(breaks="none", code=0, **settings):
        """Its output, {run: its train.py command}, the other commands."""
        log.unlink(missing_ok=True)
        env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LOG": str(log),
               "BREAKS": breaks,
               "OUT": str(out), "DATA": str(tmp_path / "data"), "SEEDS": "1 2", "STEPS": "40", "EVERY": "20",
               "POINTS": "20 40", "BASE_STEPS": "10", "ENC_CKPT": "dinov2.pt", **settings}
        done = subprocess.run(["bash", "experiments/compare.sh"], cwd=ROOT, env=env, capture_output=True,
                              text=True)
        assert done.returncode == code, done.stdout + done.stderr
        lines = log.read_text().splitlines()
        trained = {line.split("--exp-name ")[1].split()[0]: line for line in lines
                   if line.startswith("train.py")}
        return done.stdout + done.stderr, trained, [line for line in lines if "evaluate" in line]

    printed, trained, evaluated = start(breaks="repae-2")
    runs = [f"{regime}-{seed}" for regime in compare.REGIMES for seed in (1, 2)]
    runs += [f"{ablation}-1" for ablation in compare.ABLATIONS if ablation != "mine"]
    assert set(trained) == {"base", "vae", *runs}
    assert "repae-2 failed" in printed and "second-2 failed" in printed               # it needs repae-2's VAE
    tuned, last = out / "vae/checkpoints/0000040.pt", "checkpoints/0000040.pt"
    frozen, base = "--vae-grad none --cache-latents", f"--vae-ckpt {out}/base/checkpoints/0000010.pt"
    for run_name, end in (("repa-2", f"--vae-ckpt {tuned} {frozen}"), ("repae-1", base),
                          ("vae", f"--vae-only {base}"),
                          ("second-1", f"--vae-ckpt {out}/repae-1/{last} {frozen}"),
                          ("control-2", f"--vae-ckpt {out}/noalign-2/{last} {frozen}"),
                          ("scratch-1", "--vae-from-scratch"), ("both-1", f"{base} --vae-grad both")):
        assert trained[run_name].endswith(f" --kl-weight 1e-6 --vae-align-proj-coeff 0.5 {end}")
        assert f"--seed {run_name[-1].replace('e', '0')} " in trained[run_name]
    assert f"experiments/evaluate.py {out}/sit-1 --points 20 40 --samples 2000 --num-steps 20 " in "\n".join(evaluated)
    assert len(evaluated) == 2 * (len(runs) - 2) + 1                                     # and the floor

    _, trained, evaluated = start()
    assert list(trained) == ["repae-2", "second-2"] and len(evaluated) == 4
    _, trained, evaluated = start(SEEDS="1", ABLATIONS="",
                                  REGIMES="gen-first gen-first-second less-noise more-noise mse repa-mse")
    assert set(trained) == {"gen-first-1", "mse-1", "repa-mse-1", "gen-first-second-1", "less-noise-1",
                            "more-noise-1"}
    for run_name, vae_file in (("gen-first-second-1", f"gen-first-1/{last}"), ("repa-mse-1", f"vae/{last}"),
                               ("less-noise-1", "less-noise-1-vae.pt"), ("more-noise-1", "more-noise-1-vae.pt")):
        assert f"--vae-ckpt {out}/{vae_file} --vae-grad none" in trained[run_name]
    commands = log.read_text()
    for name, ckpt, other in (("less", "vae", "repae-1"), ("more", "repae-1", "vae")):
        assert (f"noise {tmp_path}/data/train {out}/{ckpt}/{last} {out}/{other}/{last} --resolution 32 "
                f"--out {out}/{name}-noise-1-vae.pt\n") in commands
    first, second = [line for line in commands.splitlines() if "--exp-name gen-first-1 " in line]
    weights = "--entropy-weight 5e-5 --vae-denoising-coeff 0.1"
    assert second.endswith(weights) and "--max-train-steps 40 " in second and "--max-train-steps 20 " in first
    assert first.endswith(f"{weights} --entropy-weight 5e-4 --vae-denoising-coeff 1 --lr-decay-steps 0")

    printed, *_ = start(code=2, FLAGS="--kl-weight 0")
    assert "has other settings" in printed and "OUT=DIR" in printed
