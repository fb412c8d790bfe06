"""experiments/: its numbers, pictures and commands."""
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
import vae
from conftest import ROOT, needs
from data.images import list_images, read_image
from experiments import analyze, compare, curves
from support.commands import UserError
from support.pictures import to_float, to_uint8

LITE0 = "efficientnet-lite0"
PLOTS = needs("matplotlib")


def call(main, monkeypatch, *argv):
    """A script's main() with these arguments."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, argv)])
    main()


# --- the scripts -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command, words", [
    ("data/openmoji.py --size 0", "--size"),
    pytest.param("experiments/analyze.py evaluate nowhere.pt", "nowhere.pt: no such file", marks=PLOTS),
    pytest.param("experiments/compare.py nowhere", "nowhere: no results", marks=PLOTS),
    pytest.param("experiments/curves.py nowhere", "nowhere: no such file", marks=PLOTS),
])
def test_scripts_run_from_anywhere_and_fail_in_one_line(command, words, tmp_path):
    script, *flags = command.split()
    done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error") and words in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("main, argv", [(analyze.main, ["evaluate", "x.pt"]), (analyze.main, ["latents", "x", "y"]),
                                        (compare.main, []), (curves.main, ["x"])])
def test_without_matplotlib_one_line_says_how_to_get_it(main, argv, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        call(main, monkeypatch, *argv)


# --- alignment ---------------------------------------------------------------------------------------------------

def test_cknna_by_counting():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 6)), rng.normal(size=(40, 9))
    b[:, :6] += a
    n, k = len(a), 5

    def kernel(f):
        f = f / np.linalg.norm(f, axis=1, keepdims=True)
        return f @ f.T

    def neighbours(f):
        return [set(sorted((j for j in range(n) if j != i), key=lambda j: -f[i, j])[:k]) for i in range(n)]

    def hsic(x, y, nx, ny):                                  # Song et al. 2012, eq. 5, its sums written out
        x, y = ([[f[i, j] if j != i and j in nx[i] and j in ny[i] else 0.0 for j in range(n)] for i in range(n)]
                for f in (x, y))
        diagonal = sum(x[i][j] * y[j][i] for i in range(n) for j in range(n))
        product = sum(x[i][j] * y[j][l] for i in range(n) for j in range(n) for l in range(n))
        total = sum(map(sum, x)) * sum(map(sum, y))
        return (diagonal + total / ((n - 1) * (n - 2)) - 2 * product / (n - 2)) / (n * (n - 3))

    x, y = kernel(a), kernel(b)
    nx, ny = neighbours(x), neighbours(y)
    expected = hsic(x, y, nx, ny) / math.sqrt(hsic(x, x, nx, nx) * hsic(y, y, ny, ny))
    a, b = torch.tensor(a), torch.tensor(b)
    torch.manual_seed(0)
    assert analyze.cknna(a, b, k) == pytest.approx(expected, rel=1e-4)
    assert analyze.cknna(a, a, k) == pytest.approx(1, rel=1e-5)
    turned = a @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] * 3
    assert analyze.cknna(turned, b, k) == pytest.approx(expected, rel=1e-4)
    strangers = [analyze.cknna(a, torch.randn(40, 9), k) for _ in range(50)]               # of no relation to a
    assert np.mean(strangers) < 0.6 * expected


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of 12 pictures of 32 x 32: smooth ones, so that their features differ."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("one", "two words"):
        (folder / name).mkdir()
        for i in range(12):
            small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
            small.resize((32, 32), Image.BICUBIC).save(folder / name / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(pictures, tmp_path_factory):
    """A checkpoint of random weights, none of them zero, so that labels, times and blocks all matter."""
    torch.manual_seed(0)
    net = sit.SiT("SiT-T/2", 8, 8, num_classes=3, encoder_depth=2)
    for p in net.parameters():
        if p.requires_grad and p.std() == 0:
            torch.nn.init.normal_(p, std=0.1)
    net.bn.start(torch.linspace(-0.2, 0.2, 8), torch.linspace(0.5, 1.5, 8))
    args = dict(resolution=32, num_classes=3, cfg_prob=0.1, path_type="linear", enc_type=LITE0, encoder_depth=2,
                proj_coeff=0.5, data_dir="nowhere", val_dir=str(pictures), classes=["extra", "two words", "one"])
    file = tmp_path_factory.mktemp("exps") / "run/checkpoints/0000004.pt"
    file.parent.mkdir(parents=True)
    state = net.state_dict()
    torch.save(dict(model=state, ema=state, vae=vae.AutoencoderKL("f4d8").state_dict(), args=args, steps=4), file)
    return file


def changed(checkpoint, file, **args):
    """A copy of a checkpoint with other args."""
    ckpt = torch.load(checkpoint, weights_only=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(ckpt | dict(args=ckpt["args"] | args), file)
    return file


@PLOTS
@torch.no_grad()
def test_evaluate_measures_what_it_says(checkpoint, pictures, monkeypatch, capsys):
    """Against the same quantities computed here, all images in one batch, blocks read off by hand."""
    call(analyze.main, monkeypatch, "evaluate", checkpoint, "--device", "cpu")
    out, run = capsys.readouterr().out, checkpoint.parents[1]
    record = json.loads((run / "evaluation-0000004.json").read_text())
    assert record["images"] == 24 and record["encoder"] == LITE0 and "24 images" in out

    ckpt = torch.load(checkpoint, weights_only=True)
    net = sit.SiT("SiT-T/2", 8, 8, num_classes=3, encoder_depth=6)
    net.load_state_dict(ckpt["ema"])
    net.eval()
    autoencoder = vae.AutoencoderKL("f4d8")
    autoencoder.load_state_dict(ckpt["vae"])
    files = sorted((pictures / "one").iterdir()) + sorted((pictures / "two words").iterdir())
    x = torch.stack([torch.tensor(np.asarray(Image.open(f)) / 127.5 - 1).permute(2, 0, 1) for f in files]).float()
    y = torch.tensor([2] * 12 + [1] * 12)                                  # by name, in the checkpoint's order
    noise = np.stack([np.random.default_rng(i).standard_normal((2, 8, 8, 8), np.float32) for i in range(24)])
    noise, eps = torch.tensor(noise).unbind(1)
    moments = autoencoder.quant_conv(autoencoder.encoder(x))
    z = moments[:, :8] + (0.5 * moments[:, 8:].clamp(-30, 20)).exp() * noise
    mean, var = (ckpt["ema"][f"bn.running_{name}"].view(1, 8, 1, 1) for name in ("mean", "var"))
    z = (z - mean) / (var + 1e-4).sqrt()
    for t, value in record["denoising_loss"].items():
        t = float(t)
        v = net((1 - t) * z + t * eps, torch.full((24,), t), y)[0]
        assert value == pytest.approx((v - (eps - z)).square().mean().item(), rel=1e-4)
    assert list(record["denoising_loss"]) == [f"0.{k}" for k in range(1, 10)]

    features = analyze.FrozenEncoder(LITE0, 4)(x).mean(1)
    t, h = torch.full((24,), 0.5), net.x_embedder(0.5 * z + 0.5 * eps) + net.pos_embed
    c = net.t_embedder(t) + net.y_embedder(y)
    for block, value in zip(net.blocks, record["cknna"], strict=True):
        h = block(h, c)
        assert value == pytest.approx(analyze.cknna(h.mean(1), features), abs=2e-3)
    assert Image.open(run / "evaluation-0000004.png").width > 800
    printed = [float(word) for word in out.split("CKNNA by block")[1].splitlines()[0].split()[1::2]]
    assert printed == pytest.approx(record["cknna"], abs=5e-4)


@PLOTS
def test_evaluate_matches_classes_by_name(checkpoint, pictures, tmp_path, monkeypatch):
    assert [label for _, label in analyze.labelled_images(pictures, ["two words", "x", "one"])] == [2] * 12 + [0] * 12
    older = changed(checkpoint, tmp_path / "a.pt", classes=None, data_dir=str(pictures))
    call(analyze.main, monkeypatch, "evaluate", older)                     # lists the training folder
    assert (tmp_path / "evaluation-a.json").is_file()
    for args, flags, words in (
            (dict(classes=["one", "three"]), [], "class two words is none of those"),
            (dict(classes=None), [], "nowhere: no such folder"),
            (dict(classes=None, data_dir=None, val_dir=None), [], "--data-dir is not given"),
            (dict(vae_only=True), [], "no SiT to evaluate"),
            ({}, ["--val-dir", tmp_path / "none"], "none: no such folder"),
            ({}, ["--enc-type", "no-such-net"], "no-such-net")):
        file = changed(checkpoint, tmp_path / "b.pt", **args)
        with pytest.raises(UserError, match=words):
            call(analyze.main, monkeypatch, "evaluate", file, *flags)
    few = tmp_path / "few/one"
    few.mkdir(parents=True)
    for file in sorted((pictures / "one").iterdir())[:10]:
        (few / file.name).symlink_to(file)
    with pytest.raises(UserError, match="10 images; CKNNA is over each one's 10 nearest"):
        call(analyze.main, monkeypatch, "evaluate", checkpoint, "--val-dir", few.parent)
    assert not (tmp_path / "evaluation-b.json").exists()


# --- latents -----------------------------------------------------------------------------------------------------

@PLOTS
@torch.no_grad()
def test_latents_command_prints_the_spectrum(checkpoint, pictures, tmp_path, monkeypatch, capsys):
    other = changed(checkpoint, tmp_path / "other.pt")
    drawn, draw = [], analyze.draw_latents

    def draw_and_keep(*args):
        drawn.append(args)
        draw(*args)

    monkeypatch.setattr(analyze, "draw_latents", draw_and_keep)
    out = tmp_path / "latents.png"
    call(analyze.main, monkeypatch, "latents", pictures, checkpoint, other, other, "--resolution", 32, "--out", out)
    (rows, spectra, _), text = drawn[0], capsys.readouterr().out
    assert list(rows) == ["images", "run 0000004", "other", str(other)] and list(spectra) == list(rows)[1:]
    assert all(pictures.shape == (12, 3, 32, 32) for pictures in rows.values())

    autoencoder = vae.AutoencoderKL("f4d8")
    autoencoder.load_state_dict(torch.load(checkpoint, weights_only=True)["vae"])
    x = torch.stack([to_float(read_image(file)) for file in list_images(pictures)])
    moments = autoencoder.quant_conv(autoencoder.encoder(x)).permute(0, 2, 3, 1).reshape(-1, 16).numpy()
    flat, added = moments[:, :8], np.exp(moments[:, 8:]).mean(0) / moments[:, :8].var(0)
    eigenvalues = np.linalg.eigvalsh(np.cov(flat.T.astype(float), bias=True))[::-1]
    for variances in spectra.values():
        assert np.allclose(variances, eigenvalues, rtol=1e-3, atol=1e-7)
    share = eigenvalues / eigenvalues.sum()
    assert f"variance {flat.var(0).mean():.4g}, {1 / np.square(share).sum():.2f} effective dimensions of 8" in text
    assert f"; sampling adds {added.mean():.2%}\n" in text
    assert "24 images" in text and Image.open(out).width > 1000


# --- reconstructions ---------------------------------------------------------------------------------------------

@torch.no_grad()
def test_reconstruct_command_prints_psnr_and_ssim(checkpoint, pictures, tmp_path, monkeypatch, capsys):
    call(analyze.main, monkeypatch, "reconstruct", checkpoint, pictures, "--resolution", 32, "--out",
         tmp_path / "r.png", "--vgg-ckpt", "nowhere", "--device", "cpu")
    out = capsys.readouterr().out
    autoencoder, _ = vae.load_vae(checkpoint)
    x = torch.stack([read_image(file) for file in list_images(pictures)])
    y = to_uint8(autoencoder.decode(autoencoder.encode(to_float(x)).mean))
    mse = ((x.double() - y.double()) / 255).square().mean((1, 2, 3))
    printed = dict(line.rsplit(None, 1) for line in out.splitlines() if line.startswith("  "))
    assert float(printed["  PSNR (dB)"]) == pytest.approx((-10 * mse.log10()).mean().item(), abs=0.01)
    assert float(printed["  SSIM"]) == pytest.approx(vae.ssim(to_float(x), to_float(y)).mean().item(), abs=1e-3)
    assert "no LPIPS: " in out and "LPIPS" not in "".join(printed) and "24 images; originals beside" in out
    grid = np.asarray(Image.open(tmp_path / "r.png"))[::2, ::2]                # 4 pairs a row, doubled; gap 2
    assert grid.shape == (6 * 34 - 2, 8 * 34 - 2, 3)
    assert np.array_equal(grid[34:66, :32], x[4].permute(1, 2, 0))
    assert np.abs(grid[34:66, 34:66].astype(int) - y[4].permute(1, 2, 0).numpy()).max() <= 1
    for argv, words in (((checkpoint, tmp_path / "none"), "must be a file or folder that exists"),
                        ((checkpoint, pictures, "--resolution", 33), "not divisible by the VAE's stride"),
                        ((tmp_path / "none.pt", pictures), "none.pt: no such file")):
        with pytest.raises(UserError, match=words):
            call(analyze.main, monkeypatch, "reconstruct", *argv)


# --- curves ------------------------------------------------------------------------------------------------------

def write_metrics(run, rows):
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@PLOTS
def test_curves_of_runs(tmp_path, monkeypatch, capsys):
    rows = [dict(step=10 * k, l1_loss=1 / k, kl_loss=5.0, skipped=0) for k in range(1, 40)]
    first = write_metrics(tmp_path / "a", rows)
    second = write_metrics(tmp_path / "b", [dict(step=5, l1_loss=0.5, loss=math.nan), dict(step=9, loss=-1.5)])
    out = tmp_path / "curves.svg"
    call(curves.main, monkeypatch, first, second, "--out", out)
    assert "2 runs, 3 metrics" in capsys.readouterr().out and "<svg" in out.read_text()
    call(curves.main, monkeypatch, first, "--metrics", "skipped", "l1_loss", "--out", tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").width > 500
    rows = [dict(step=50 * k, loss=k) | ({"val_psnr": 20 + k / 10} if k % 6 == 0 else {}) for k in range(1, 25)]
    (second / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    call(curves.main, monkeypatch, second, "--table", "--out", out)
    assert capsys.readouterr().out.splitlines()[:9] == [
        "b:", "", "| step | loss | val_psnr |", "|---|---|---|", "| 250 | 5 |  |", "| 500 | 10 |  |",
        "| 700 | 14 |  |", "| 950 | 19 |  |", "| 1,200 | 24 | 22.4 |"]
    with pytest.raises(UserError, match="must end in .png"):
        call(curves.main, monkeypatch, first, "--out", "x.bmp")
    with pytest.raises(UserError, match="--metrics nothing: in none of these runs; there are l1_loss, kl_loss"):
        call(curves.main, monkeypatch, first, "--metrics", "nothing")


def test_metrics_are_read_for_curves(tmp_path):
    first = write_metrics(tmp_path / "a", [dict(step=10 * k, l1_loss=1 / k) for k in range(1, 4)])
    second = write_metrics(tmp_path / "b", [dict(step=5, l1_loss=0.5, loss=math.nan), dict(step=9, loss=-1.5)])
    assert curves.read_metrics(first)["l1_loss"][0] == [10, 20, 30]
    assert curves.read_metrics(second / "metrics.jsonl") == {"l1_loss": ([5], [0.5]), "loss": ([9], [-1.5])}
    assert curves.wants_log_scale([1, 30]) and not curves.wants_log_scale([1, 19])
    assert not curves.wants_log_scale([-1, 30]) and not curves.wants_log_scale([0, 30])
    (second / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    with pytest.raises(UserError, match="line 2"):
        curves.read_metrics(second)
    (second / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no metrics in it yet"):
        curves.read_metrics(second)


# --- the comparison ----------------------------------------------------------------------------------------------

def write_run(run, distances, last, cknna, psnr):
    """Results as judge.py and analyze.py write them: `distances` at steps 100, 200, ..., `last` to reconstructions."""
    run.mkdir(parents=True)
    fd = {str(100 * k): value for k, value in enumerate(distances, 1)}
    record = dict(features="net", samples=2000, fd=fd, fd_to_reconstructions=last, rfd=50.04, psnr=psnr)
    (run / "judged.json").write_text(json.dumps(record))
    (run / f"evaluation-{100 * len(distances):07d}.json").write_text(json.dumps(dict(cknna=[0.5, cknna, 0.6])))
    (run / "args.json").write_text(json.dumps(dict(encoder_depth=2)))


@PLOTS
def test_comparison_table_and_curves(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "repa-1", [600, 500, 410], 390, 0.2, 27)
    write_run(tmp_path / "repa-2", [610, 500, 390], 400, 0.3, 28)
    write_run(tmp_path / "repae-1", [500, 420, 340], 300, 0.4, 26)
    write_run(tmp_path / "repae-2", [500, 380, 300], 310, 0.4, 26)
    write_run(tmp_path / "second-1", [600, 450, 350], 300, 0.4, 26)
    write_run(tmp_path / "sit-2", [700, 600, 500], 480, 0.1, 27)
    write_run(tmp_path / "naive-1", [900, 800], 700, 0.1, 20)                                # still running
    write_run(tmp_path / "both-1", [800, 700, 600], 650, 0.1, 20)
    call(compare.main, monkeypatch, tmp_path, "--seeds", 1, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("| | seeds | FD, 100 steps | FD, 200 steps | FD, 300 steps | to its VAE's reconstructions | CKNNA | "
                        "FD of these reconstructions | their PSNR, dB |")
    assert set(lines[1]) == set("|-") and lines[1].count("|") == lines[0].count("|")
    assert lines[2:6] == [
        "| SiT (`sit`) | 1 | 700.0 | 600.0 | 500.0 | 480.0 | 0.100 | 50.0 | 27.00 |",
        "| REPA (`repa`) | 2 | 605.0 (600.0 to 610.0) | 500.0 | 400.0 (390.0 to 410.0) | 395.0 (390.0 to 400.0) | "
        "0.250 (0.200 to 0.300) | 50.0 | 27.50 (27.00 to 28.00) |",
        "| REPA-E (`repae`) | 2 | 500.0 | 400.0 (380.0 to 420.0) | 320.0 (300.0 to 340.0) | 305.0 (300.0 to 310.0) | "
        "0.400 | 50.0 | 26.00 |",
        "| REPA over REPA-E's frozen VAE (`second`) | 1 | 600.0 | 450.0 | 350.0 | 300.0 | 0.400 | 50.0 | 26.00 |"]
    assert lines[6] == ("| diffusion and alignment into the VAE (`both`) | 1 | 800.0 | 700.0 | 600.0 | 650.0 | 0.100 | "
                        "50.0 | 20.00 |")
    text = "\n".join(lines[7:])
    assert "FD: the Frechet distance of 2,000 samples over net." in text
    assert ("REPA ends at 400 after 300 steps. REPA-E reaches it after 200. "
            "REPA over REPA-E's frozen VAE reaches it after 250.") in text
    assert ("SiT ends at 500 after 300 steps. REPA-E reaches it after at most 100. "
            "REPA over REPA-E's frozen VAE reaches it after 167.") in text
    assert "left out: naive-1." in text
    assert Image.open(tmp_path / "comparison.png").width > 600


def test_comparison_refuses_other_features_and_damaged_results(tmp_path):
    write_run(tmp_path / "repa-1", [600, 500, 410], 390, 0.2, 27)
    write_run(tmp_path / "repa-2", [610, 500, 390], 400, 0.3, 28)
    record = json.loads((tmp_path / "repa-1/judged.json").read_text())
    for other in (dict(features="another"), dict(samples=1000)):
        (tmp_path / "repa-1/judged.json").write_text(json.dumps(record | other))
        with pytest.raises(UserError, match="different features or numbers of samples"):
            compare.read_runs(tmp_path, [1, 2])
    (tmp_path / "repa-1/judged.json").write_text("{")
    with pytest.raises(UserError, match="judged.json: damaged"):
        compare.read_runs(tmp_path, [1, 2])


def test_steps_to_reach():
    steps = [100, 200, 400]
    assert compare.steps_to_reach(250, steps, [400, 300, 200]) == 300         # half of the way from 200 to 400
    assert compare.steps_to_reach(300, steps, [400, 300, 200]) == 200
    assert compare.steps_to_reach(450, steps, [400, 300, 200]) == 100
    assert compare.steps_to_reach(199, steps, [400, 300, 200]) is None


STAND_IN = '''#!/usr/bin/env bash
# in python's place: notes each command and makes the files that it would make
echo "$*" >> "$NOTES"
value() { while [ $# -gt 1 ]; do if [ "$1" = "$flag" ]; then last=$2; fi; shift; done; echo "$last"; }
case $1 in
    train.py)
        flag=--output-dir; out=$(value "$@"); flag=--exp-name; run=$out/$(value "$@")
        flag=--max-train-steps; steps=$(value "$@"); last=; flag=--vae-ckpt; vae=$(value "$@")
        [ -z "$vae" ] || [ -f "$vae" ] || exit 2
        case $run in *"$BREAKS") exit 0 ;; esac                          # as on Ctrl-C: stopped, and no error
        mkdir -p "$run/checkpoints"; echo > "$run/metrics.jsonl"
        touch "$run/checkpoints/$(printf %07d $((steps / 2))).pt" "$run/checkpoints/$(printf %07d $steps).pt" ;;
    experiments/judge.py)
        if [ "$2" = --floor ]; then echo real; else touch "$2/judged.json"; fi ;;
    experiments/analyze.py)
        [ "$2" = latents ] || touch "${3%/checkpoints/*}/evaluation-$(basename "$3" .pt).json" ;;
esac
'''


@pytest.mark.skipif(os.name != "posix", reason="a bash script")
def test_compare_sh_does_nothing_twice(tmp_path):
    """With python replaced: which commands it gives, that it goes on where a run stopped, and then rests."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(STAND_IN)
    (tmp_path / "bin/python").chmod(0o755)
    (tmp_path / "data").mkdir()

    def start(breaks="none", code=0, **settings):
        notes = tmp_path / "notes"
        notes.unlink(missing_ok=True)
        env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "NOTES": str(notes), "BREAKS": breaks,
               "OUT": str(tmp_path / "out"), "DATA": str(tmp_path / "data"), "SEEDS": "1 2", "STEPS": "40",
               "EVERY": "20", "POINTS": "20 40", "BASE_STEPS": "10",
               "ENC_CKPT": "dinov2.pt", **settings}
        done = subprocess.run(["bash", "experiments/compare.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        kinds = "train", "experiments/judge", "experiments/analyze.py evaluate"
        return done.stdout + done.stderr, [line for line in notes.read_text().splitlines() if line.startswith(kinds)]

    printed, first = start(breaks="repae-2")
    trained = {line.split("--exp-name ")[1].split()[0]: line for line in first if line.startswith("train.py")}
    assert set(trained) == {"base", "vae", *(f"{r}-{s}" for r in compare.REGIMES for s in (1, 2)),
                            *(f"{ablation}-1" for ablation in compare.ABLATIONS)}
    assert all(f"{run} done" in printed for run in ("repae-1", "sit-2", "second-1", "both-1"))
    assert "repae-2 failed" in printed and "second-2 failed" in printed          # the one needs the other's VAE
    out = tmp_path / "out"
    assert not [line for line in first if "repae-2" in line and line.startswith("experiments")]
    base, tuned = out / "base/checkpoints/0000010.pt", out / "vae/checkpoints/0000040.pt"
    frozen, last = "--vae-grad none --cache-latents --vae-ckpt", "checkpoints/0000040.pt"
    tuning, level = f"--vae-ckpt {base}", "--enc-ckpt dinov2.pt --kl-weight 1e-6 --vae-align-proj-coeff 0.5 "
    for run, flags in (("sit-1", f"{frozen} {tuned} --proj-coeff 0"), ("repa-2", f"{frozen} {tuned}"),
                       ("second-1", f"{frozen} {out}/repae-1/{last}"),
                       ("control-2", f"{frozen} {out}/noalign-2/{last}"), ("scratch-1", "--vae-from-scratch"),
                       ("naive-1", f"{tuning} --vae-grad diffusion"),
                       ("both-1", f"{tuning} --vae-grad both"),
                       ("repae-1", tuning), ("nonorm-1", f"{tuning} --no-latent-norm"),
                       ("noalign-1", f"{tuning} --vae-align-proj-coeff 0"),
                       ("irepa-1", f"{tuning} --projector conv --spatial-norm 0.6 --proj-coeff 1"),
                       ("lite0-1", f"{tuning} --enc-type efficientnet-lite0"),
                       ("weight-1", f"{tuning} --vae-align-proj-coeff 1.5"),
                       ("float32-1", f"{tuning} --mixed-precision no"),
                       ("vae", f"--vae-only --vae-ckpt {base}")):
        assert f"--seed {run[-1] if run != 'vae' else 0} " in trained[run]
        assert trained[run].endswith(level + flags) and "--max-train-steps 40 --checkpointing-steps 20" in trained[run]
        assert "--enc-type dinov2-vit-s" in trained[run]
    judged = [line for line in first if line.startswith("experiments/judge.py") and "--floor" not in line]
    assert (f"experiments/judge.py {out}/sit-1 --points 20 40 --samples 2000 --num-steps 20 --features "
            "efficientnet-lite2") in judged
    assert len(judged) == len(compare.REGIMES) * 2 - 2 + len(compare.ABLATIONS)

    _, again = start()                                                     # only what did not get done
    assert [line.split("--exp-name ")[1].split()[0] for line in again if line.startswith("train")] == [
        "repae-2", "second-2"]
    assert len(again) == (1 + 1 + 1) + (1 + 1 + 1)
    assert start()[1] == []
    more = start(SEEDS="1 2 3")[1]
    assert {line.split("--seed ")[1].split()[0] for line in more if line.startswith("train")} == {"3"}
    others = start(OUT=str(tmp_path / "other"), SEEDS="1", REGIMES="control second noalign repae", ABLATIONS="")[1]
    names = [line.split("--exp-name ")[1].split()[0] for line in others if line.startswith("train")]
    assert set(names[2:4]) == {"noalign-1", "repae-1"} and set(names[4:]) == {"second-1", "control-1"}
    for other in (dict(STEPS="80"), dict(FLAGS="--kl-weight 0"), dict(SAMPLES="100")):
        printed, _ = start(code=2, **other)
        assert "was begun with" in printed and "OUT=DIR" in printed
