"""fid.py against torch-fidelity, scipy and counting; and on what people hand to it."""
import json
import math
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import sqrtm

import fid
import repa
import sample
import vae
from conftest import CPU, ROOT, close, nchw, needs, one_line, run, slow, smooth_pictures, torchrun
from data.images import list_images, read_image
from support.commands import UserError
from support.pictures import to_float, to_uint8

FLAGS = ("--device", "cpu", "--num-workers", "0")
INCEPTION = SimpleNamespace(name="inception", sha256="a" * 64, channels=2048, size=299)     # stands for the network


def save_folder(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def noise(n, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def folder_of(path, images, suffix=".png"):
    path.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03d}{suffix}")
    return path


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random Inception weights whose batch norms were fitted to pictures, so that activations keep their size."""
    torch.manual_seed(0)
    with torch.device("meta"):
        net = timm.create_model("inception_v3", num_classes=1008, aux_logits=False)
    net = net.to_empty(device="cpu")
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight)
        elif isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = 1.0
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.2)
    nn.init.normal_(net.fc.bias)
    with torch.no_grad():
        net.train()(F.interpolate(nchw(smooth_pictures(6, 64, seed=9)).float(), size=(160, 160)) / 128 - 1)
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), file)
    return file


@pytest.fixture(scope="session")
def inception(inception_file):
    return fid.Inception(inception_file)


@pytest.fixture(scope="session")
def resnet_file(tmp_path_factory):
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("resnet") / "resnet18.pth"
    torch.save(timm.create_model("resnet18").state_dict(), file)
    return file


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(timm.create_model("resnet18").state_dict(), file)
    return ["--features", "resnet18", "--features-weights", str(file), "--device", "cpu", "--num-workers", "0"]


def evaluate(monkeypatch, capsys, *flags):
    """fid.py with these flags: what it prints."""
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, flags)])
    fid.main()
    return capsys.readouterr().out


# --- Features ---------------------------------------------------------------------------------------------------------

def peer(inception_file, features):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    return FeatureExtractorInceptionV3("inception", features, feature_extractor_weights_path=str(inception_file))


@needs("torch_fidelity")
@pytest.mark.parametrize("size", [32, 64, 256, 299])
def test_inception_features_match_torch_fidelity(inception, inception_file, size):
    images = nchw(smooth_pictures(3, size, seed=size, blur=16))
    caught = []
    hook = inception.net.Mixed_6e.register_forward_hook(lambda m, x, y: caught.append(y.mean((2, 3))))
    with torch.no_grad():
        ours = inception(images)
        theirs = peer(inception_file, ["768", "2048", "logits_unbiased", "logits"])(images)
    hook.remove()
    assert 0.01 < theirs[1].std() < 100  # the random weights neither vanish nor explode
    close(caught[0], theirs[0], 1e-4)
    close(ours["pool"], theirs[1], 1e-4)
    close(ours["logits"], theirs[2], 1e-4)
    close(ours["logits"] + inception.net.fc.bias, theirs[3], 1e-4)


@needs("torch_fidelity")
def test_sfid_features_are_the_first_branch_of_mixed_6(inception, inception_file):
    net = peer(inception_file, ["2048"])
    caught = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda m, x, y: caught.append(y.clone()))
    images = nchw(smooth_pictures(2, 64))
    with torch.no_grad():
        net(images)
        spatial = inception(images)["spatial"]
    y = caught[0]                                                              # [2, 192, 17, 17]
    by_hand = [[y[b, c, i, j].item() for i in range(17) for j in range(17) for c in range(7)] for b in range(2)]
    assert spatial.shape == (2, 2023)
    close(spatial, by_hand, 1e-4)


@torch.no_grad()
def test_what_differs_from_timms_inception(inception, inception_file):
    """sFID's features are the first branch of Mixed_6d, in H, W, C order; average pools leave the padding out, the one
    of the last block takes the maximum; logits without bias. On timm's own blocks with the same weights."""
    net = timm.create_model("inception_v3", num_classes=1008, aux_logits=False).eval()
    net.load_state_dict(torch.load(inception_file, weights_only=True))
    inputs, outputs = {}, {}
    hooks = []
    for name, block in inception.net.named_children():
        def keep(block, x, out, name=name):
            inputs[name], outputs[name] = x[0], out
        hooks.append(block.register_forward_hook(keep))
    found = inception(nchw(smooth_pictures(2, 64)))
    for hook in hooks:
        hook.remove()
    pooled = [name for name, block in net.named_children() if hasattr(block, "branch_pool")]
    assert len(pooled) == 9
    for name in pooled:
        x, block = inputs[name], getattr(net, name)
        windows = F.unfold(F.pad(x, (1, 1, 1, 1), value=math.nan), 3).unflatten(1, (x.shape[1], 9))
        values = windows.nan_to_num(-math.inf).amax(2) if name == "Mixed_7c" else windows.nanmean(2)
        close(outputs[name][:, -len(block.branch_pool.bn.weight):], block.branch_pool(values.view_as(x)), 1e-4)
    branch = net.Mixed_6d.branch1x1(inputs["Mixed_6d"])                        # [2, 192, 17, 17]
    by_hand = [[branch[b, c, i, j] for i in range(17) for j in range(17) for c in range(7)] for b in range(2)]
    close(found["spatial"], by_hand, 1e-4)
    close(found["logits"] + net.fc.bias, net.fc(found["pool"]), 1e-4)


def test_the_resize_is_tensorflow_1s():
    ramp = torch.arange(4, dtype=torch.uint8).mul(10).view(1, 1, 1, 4).expand(1, 3, 2, 4)
    assert fid.resize_tf1(ramp, 8)[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]  # corners not centred


def switches():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu")


@pytest.fixture
def set_tf32():
    """set_tf32(matmul, cudnn), until the test ends."""
    def set_both(*state):
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = state
    before = switches()[:2]
    yield set_both
    set_both(*before)


def test_features_are_in_full_float32_whatever_the_switches_are(inception, set_tf32):
    images, seen, pooled = nchw(smooth_pictures(2, 64)), [], repa.FrozenEncoder("resnet18", random=True).pooled

    def note(module, *_):
        if module is not inception:                                     # whose call is longer than its layers
            seen.append(switches())

    for net in (lambda images: inception(images)["pool"], pooled):
        with torch.no_grad():
            plain = net(images)
            for state in ((True, True), (True, False), (False, True)):
                set_tf32(*state)
                hook = nn.modules.module.register_module_forward_hook(note)
                with torch.autocast("cpu", torch.bfloat16):
                    features = net(images)
                    assert switches() == (*state, True)
                hook.remove()
                assert torch.equal(features, plain) and features.dtype == torch.float32
    assert len(seen) > 300 and set(seen) == {(False, False, False)}


def test_samples_are_those_of_sample_py_bit_for_bit(short_run, tmp_path, command):
    """The same flags, more than a batch; both use TF32, and the feature network does not."""
    ckpt, seen = short_run / "exps/a/checkpoints/0000004.pt", {}
    flags = ["--ckpt", ckpt, "--no-ema", "--num-samples", 70, "--num-steps", 2, "--seed", 3, "--label-sampling",
             "random", "--device", "cpu"]

    def note(module, *_):
        seen.setdefault(type(module).__name__, set()).add(switches())

    command("sample", *flags, "--out", "x.npz")
    args = fid.parse_args([*map(str, flags)])
    _, samples = fid.open_sources(args, CPU)
    batches = list(samples.batches(range(70), args.batch_size))
    images = torch.cat(batches)
    assert len(batches) == 2 and torch.equal(images, nchw(np.load(tmp_path / "x.npz")["arr_0"]))
    hook = nn.modules.module.register_module_forward_hook(note)
    for more in (flags[:-4], [*flags[:2], "--reconstruct"]):
        command("fid", *more, *FLAGS, "--features", repa.LITE2, "--metrics", "fid")
    hook.remove()
    assert seen["SiT"] == seen["Decoder"] == seen["Encoder"] == {(True, True, False)}
    assert seen["InvertedResidual"] == {(False, False, False)}


# --- Metrics ----------------------------------------------------------------------------------------------------------

def rows(n, d, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / d ** 0.5
    return torch.from_numpy((x + shift) ** 2).float()


@needs("torch_fidelity")
def test_metrics_match_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    a, b = rows(1000, 128, 1), rows(1000, 128, 2, 0.1)
    moments = []
    for f in (a, b):
        x = F.pad(f.double(), (1, 0), value=1)
        moments.append(fid.mean_and_covariance(x.T @ x))
        assert np.allclose(moments[-1][0], f.numpy().mean(0))
        assert np.allclose(moments[-1][1], np.cov(f.double().numpy().T), atol=1e-6)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(f) for f in (a, b)), False)
    ours = fid.frechet_distance(*moments[0], *moments[1])
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)

    for n, m, size in ((1000, 1000, 1000), (900, 700, 300)):
        theirs = kid_features_to_metric(a[:n], b[:m], kid_subsets=20, kid_subset_size=size, rng_seed=2020,
                                        verbose=False)
        ours = fid.kid(a[:n], b[:m], subsets=20, size=size)
        assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)

    logits = 3 * torch.randn(1000, 1008, generator=torch.Generator().manual_seed(0))
    theirs = isc_features_to_metric(logits, splits=1, shuffle=False)
    assert fid.inception_score(logits) == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


# Features that lie close together, 0.1% of their norm apart, beside those that do not.
@pytest.fixture(params=["spread out", "close together"])
def near(request):
    return (lambda x: x) if request.param == "spread out" else lambda x: (1e-3 * x + 1).float()


def test_kid_of_whole_sets_by_counting(near):
    """With as many in a subset as there are, each subset is everything: the unbiased estimate, written out."""
    x, y = near(rows(30, 8, 5)), near(rows(30, 8, 6, 0.2))
    k = [[[(float(a.double() @ b.double()) / 8 + 1) ** 3 for b in g] for a in f] for f, g in ((x, x), (y, y), (x, y))]
    within = sum(m[i][j] for m in k[:2] for i in range(30) for j in range(30) if i != j) / (30 * 29)
    expected = within - 2 * sum(map(sum, k[2])) / 900
    assert fid.kid(x, y, subsets=3) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n, ends", [(50_000, range(0, 50_001, 5000)), (5001, [0, 5001]), (8001, [0, 4001, 8001])])
def test_inception_score_over_equal_splits_of_about_5000(n, ends):
    logits = 2 * torch.randn(n, 20, generator=torch.Generator().manual_seed(1))
    p = logits.double().softmax(1)
    by_hand = [(q * (q.log() - q.mean(0).log())).sum(1).mean().exp() for q in p.split(np.diff(ends).tolist())]
    assert fid.inception_score(logits) == pytest.approx(np.mean(by_hand), rel=1e-9)


def test_inception_score_of_a_folder_sorted_by_class(tmp_path):
    """10 classes of 1000 sure images: 10, where the splits hold all classes; an .npz keeps its order, as in ADM."""
    def net(images):
        label = images[:, 0, 0, 0].long()
        return dict(pool=torch.zeros(len(images), 2), logits=50 * F.one_hot(label, 10).float())

    net.name, net.channels = "inception", 2
    images = np.arange(10, dtype=np.uint8).repeat(1000).reshape(-1, 1, 1, 1) * np.ones((1, 1, 1, 3), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images)
    in_order = fid.ImageSet(tmp_path / "x.npz")
    folder = fid.ImageSet(folder_of(tmp_path / "folder", images[:4]))
    reconstructed = fid.Reconstructions("x.pt", None, folder)
    for source, score in ((in_order, 5), (folder, 10), (reconstructed, 10)):
        source.n, source.batches = in_order.n, in_order.batches
        found = fid.evaluate([source, source], net, ["is"], device=CPU, batch_size=1000)
        assert found["is"] == pytest.approx(score, rel=1e-2)


def test_frechet_distance_against_scipy_and_closed_form():
    rng = np.random.default_rng(0)
    for rank in (64, 20):  # 20: singular covariances, as of few images
        m1, m2 = rng.standard_normal((2, 64))
        c1, c2 = (np.cov(rng.standard_normal((64, rank + 1)) * 3) for _ in "ab")
        ours = fid.frechet_distance(*map(torch.from_numpy, (m1, c1, m2, c2)))
        eps = 1e-9 * np.eye(64)
        root = np.trace(sqrtm((c1 + eps) @ (c2 + eps))).real
        assert ours == pytest.approx(((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * root, rel=1e-5)
    d1, d2 = rng.random(50), rng.random(50)  # commuting covariances: sum (sqrt d1 - sqrt d2)^2
    q = np.linalg.qr(rng.standard_normal((50, 50)))[0]
    ours = fid.frechet_distance(torch.zeros(50).double(), torch.from_numpy(q * d1 @ q.T),
                                torch.full((50,), 2.0).double(), torch.from_numpy(q * d2 @ q.T))
    assert ours == pytest.approx(200 + ((d1 ** 0.5 - d2 ** 0.5) ** 2).sum(), rel=1e-10)
    same = torch.from_numpy(c1)
    assert abs(fid.frechet_distance(torch.zeros(64), same, torch.zeros(64), same)) < 1e-5


def test_precision_and_recall_by_counting(near):
    a, b = (near(x).numpy().astype(np.float64) for x in (rows(230, 16, 3), rows(170, 16, 4, 0.3)))

    def radius(x, i):
        return sorted(((x[i] - x[j]) ** 2).sum() for j in range(len(x)))[3]

    ra, rb = [radius(a, i) for i in range(len(a))], [radius(b, i) for i in range(len(b))]
    precision = np.mean([any(((y - x) ** 2).sum() <= r for x, r in zip(a, ra)) for y in b])
    recall = np.mean([any(((y - x) ** 2).sum() <= r for y, r in zip(b, rb)) for x in a])
    ours = fid.precision_recall(torch.from_numpy(a).float(), torch.from_numpy(b).float(), block=64)
    assert 0.05 < precision < 0.95 and 0.05 < recall < 0.95
    assert ours == pytest.approx((precision, recall), abs=1e-9)


# --- The command ------------------------------------------------------------------------------------------------------

def frechet_distance_of_few(x, y):
    """Of features [n, D], [m, D], in closed form without a matrix of D x D: tr (C1 C2)^(1/2) is the nuclear norm of
    X Y^T, X and Y being the centred features over sqrt(n - 1) and sqrt(m - 1)."""
    d = x.mean(0) - y.mean(0)
    x, y = ((f - f.mean(0)) / math.sqrt(len(f) - 1) for f in (x, y))
    return d @ d + (x ** 2).sum() + (y ** 2).sum() - 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum()


def test_command_line_on_folders_npz_and_statistics(tmp_path, command, inception_file, resnet_file):
    """The same numbers whatever form the images come in and however they are batched."""
    a, b = smooth_pictures(6, 32, 1), smooth_pictures(5, 32, 2, blur=6)
    save_folder(tmp_path / "a", a)
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez_compressed(tmp_path / "b.npz", arr_0=b)
    with_inception = ("--inception-weights", inception_file, *FLAGS)

    def numbers(ref, samples, *flags):
        command("fid", ref, samples, "--json", "out.json", *flags)
        return json.loads((tmp_path / "out.json").read_text())

    found, of_images = [], "is,kid,precision,recall"
    command("fid", "a", "--save-stats", "stats.npz", *with_inception)
    for ref, size, metrics in (("a", 3, f"sfid,{of_images}"), ("a.npz", 7, of_images), ("stats.npz", 11, "fid")):
        found.append(numbers(ref, "b.npz", "--batch-size", size, "--metrics", metrics, *with_inception))
        assert set(found[-1]) & set(fid.METRICS) == set(metrics.split(","))
    assert all(found[1][name] == pytest.approx(found[0][name], rel=1e-4) for name in of_images.split(","))
    result = found[0] | found[2]
    assert result["n_samples"] == 5 and result["n_reference"] == 6 and result["resolution"] == [32, 32]
    net = fid.Inception(inception_file)  # against one pass over all, and numpy's covariance
    with torch.no_grad():
        features = [net(nchw(images)) for images in (a, b)]
    stats = {name: value for name, value in np.load(tmp_path / "stats.npz").items() if name.startswith(("mu", "sigma"))}
    for mu, sigma, key in (("mu", "sigma", "pool"), ("mu_s", "sigma_s", "spatial")):
        close(stats[mu], features[0][key].numpy().mean(0), 1e-4)
        close(stats[sigma], np.cov(features[0][key].double().numpy().T), 1e-3)
    for name, key in (("fid", "pool"), ("sfid", "spatial")):
        expected = frechet_distance_of_few(*(f[key].double().numpy() for f in features))
        assert result[name] == pytest.approx(expected, rel=1e-3)
    assert result["is"] == pytest.approx(fid.inception_score(features[1]["logits"]), rel=1e-3)
    assert result["precision"] == fid.precision_recall(features[0]["pool"], features[1]["pool"])[0]


    with_resnet = ("--features", "resnet18", "--features-weights", resnet_file, *FLAGS)
    one_line(command("fid", "stats.npz", "b.npz", *with_resnet, code=2), "statistics of inception")
    np.savez(tmp_path / "adm.npz", arr_0=a, **stats)                # ADM's beside images: those of another network
    assert "fd_resnet18" in numbers("adm.npz", "b.npz", *with_resnet)
    command("fid", "a", "--save-stats", "small.npz", *with_resnet)
    small = np.load(tmp_path / "small.npz")
    np.savez(tmp_path / "both.npz", arr_0=a, mu=small["mu"] + 1, sigma=small["sigma"])          # used as given
    result = numbers("both.npz", "a", "--metrics", "fid,precision,recall", *with_resnet)
    assert result["fd_resnet18"] == pytest.approx(512, rel=1e-4) and result["precision"] == result["recall"] == 1


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])
def test_evaluating_a_run(pictures, short_run, command, processes):
    """Against its own data: drawn in memory, in whatever batches and processes, or from files: the same numbers."""
    def numbers(processes, *flags):
        flags = [*flags, "--features", repa.LITE2, "--device", "cpu", "--num-workers", "0", "--json", "out.json"]
        if processes == 1:
            command("fid", *flags, cwd=short_run)
        else:
            run(*torchrun(processes), ROOT / "fid.py", *flags, cwd=short_run)
        return json.loads((short_run / "out.json").read_text())

    ckpt = short_run / "exps/a/checkpoints/0000004.pt"
    draw = ["--ckpt", ckpt, "--num-samples", "20", "--num-steps", "2", "--mixed-precision", "no"]
    metrics = ["--metrics", "fid,kid,recall"]
    command("sample", *draw, "--out", "samples.npz", "--device", "cpu", cwd=short_run)
    drawn = numbers(1, *draw, *metrics)
    again = numbers(processes, *draw, *metrics, "--batch-size", "3")
    stored = numbers(1, pictures, "samples.npz", "--resolution", "32", *metrics)
    for other in (again, stored):
        assert (other["n_samples"], other["n_reference"]) == (20, 24)
        for key in ("fd_efficientnet-lite2", "kid", "recall"):
            assert other[key] == pytest.approx(drawn[key], rel=1e-3)
    rec = numbers(processes, "--reconstruct", "--ckpt", ckpt)
    model = sample.load_checkpoint(ckpt)
    x = to_float(torch.stack([read_image(p, 32) for p in list_images(pictures)]))
    with torch.no_grad():
        y = to_float(to_uint8(model.vae.decode(model.vae.encode(x).mean)))
    assert rec["psnr"] == pytest.approx(vae.psnr(x, y).mean().item(), abs=0.01)
    assert rec["ssim"] == pytest.approx(vae.ssim(x, y).mean().item(), abs=1e-4)


def test_bad_input_is_one_clear_line(tmp_path, command, monkeypatch, resnet_file):
    save_folder(tmp_path / "good", smooth_pictures(4, 32))
    weights = ("--features", "resnet18", "--features-weights", resnet_file, "--metrics", "fid", *FLAGS)

    def fails(words, *flags):
        one_line(command("fid", *flags, code=2), *words.split("|"))

    mixed = save_folder(tmp_path / "mixed", smooth_pictures(3, 32))
    Image.new("RGB", (40, 32)).save(mixed / "x.png")
    fails("x.png: [32, 40] pixels|not [32, 32] as mixed/000.png", "good", "mixed", *weights)
    command("fid", "good", "mixed", *weights, "--resolution", 32)
    corrupt = save_folder(tmp_path / "corrupt", smooth_pictures(5, 32))
    (corrupt / "003.png").write_bytes((corrupt / "003.png").read_bytes()[:200])
    fails("003.png: cannot be read", "good", "corrupt", *weights)
    np.savez(tmp_path / "other.npz", images=smooth_pictures(3, 32))
    fails("neither arr_0", "other.npz", "good", *weights)
    np.savez(tmp_path / "float.npz", arr_0=smooth_pictures(3, 32) / 255)
    fails("arr_0 is float64", "float.npz", "good", *weights)
    np.savez(tmp_path / "wide.npz", mu=np.zeros(64), sigma=np.eye(64))
    fails("64 features|not of resnet18's 512", "wide.npz", "good", *weights)
    np.savez(tmp_path / "nan.npz", mu=np.full(512, np.nan), sigma=np.eye(512))
    fails("not finite", "nan.npz", "good", *weights)
    fails("--metrics is: sfid and is are defined on", "good", "good", *weights[:4], "--metrics", "is", *FLAGS)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    fails("pt_inception-2015-12-05-6726825d.pth|--download", "good", "good", "--features", "inception")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    fails("--download: cannot fetch|--inception-weights FILE", "good", "good", "--download")

    state = torch.load(resnet_file)
    state["conv1.weight"][0, 0, 0, 0] = math.nan
    torch.save(state, tmp_path / "nan.pth")
    fails("features not finite", "good", "good", "--features", "resnet18", "--features-weights", "nan.pth", *FLAGS)


def no_network(*args, **kwargs):
    raise OSError("no network")


def test_samples_and_reconstructions_that_are_not_finite_are_refused(short_run, command):
    ckpt = torch.load(short_run / "exps/a/checkpoints/0000004.pt", weights_only=True)
    ckpt["vae"]["decoder.conv_out.weight"][:] = 3e38                                     # finite, still
    torch.save(ckpt, short_run / "overflow.pt")
    judge = ["--ckpt", "overflow.pt", "--features", repa.LITE2, "--metrics", "fid", "--num-steps", 1, *FLAGS]
    one_line(command("fid", *judge, "--num-samples", 5, cwd=short_run, code=2), "sample 0 is not finite")
    one_line(command("fid", *judge, "--reconstruct", cwd=short_run, code=2),
             "overflow.pt: the reconstruction of image 0 is not finite")


# --- Folders, labels --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, expected", [(4, [0, 2, 5, 7]), (3, [0, 3, 6]), (12, [*range(10), 0, 1])])
def test_few_samples_are_spread_over_the_classes(monkeypatch, n, expected):
    """Whatever the batches and processes; from as many samples as classes on, image i has label i mod classes."""
    model = SimpleNamespace(args=dict(resolution=8), sit=SimpleNamespace(num_classes=10))
    drawn = {}
    monkeypatch.setattr(fid, "sample_images", lambda model, indices, labels, **kw: drawn.update(zip(indices, labels)))
    for mine in (range(n // 2), range(n // 2, n)):
        list(fid.Samples(Path("x.pt"), model, n, {}).batches(mine, 2))
    assert [drawn[i] for i in range(n)] == expected


def test_every_image_is_read_and_other_files_are_counted(tmp_path, monkeypatch, capsys, resnet):
    ref, samples = folder_of(tmp_path / "ref", noise(6, seed=1)), folder_of(tmp_path / "samples", noise(3))
    folder_of(samples, noise(2, seed=2), ".ppm")
    folder_of(samples, noise(1, seed=3), ".jfif")
    (samples / "labels.txt").write_text("0")
    np.savez(samples / "more.npz", arr_0=noise(3))
    out = evaluate(monkeypatch, capsys, ref, samples, "--metrics", "fid", *resnet)
    assert "samples: 6 images" in out and "'.txt': 1" in out and "'.npz': 1" in out
    assert f"{ref}: 6 images; not read" not in out and "samples (6) against" in out


def test_a_jpeg_is_cropped_exactly_as_adm_does(tmp_path):
    """Box-halved while at least twice the size, then bicubic; not the JPEG decoder's own shrinking."""
    smooth = Image.fromarray(noise(1, 8)[0]).resize((300, 260), Image.BICUBIC)
    for i in range(4):
        smooth.save(tmp_path / f"{i}.jpg", quality=95)
    image = Image.open(tmp_path / "0.jpg")
    for size in ((150, 130), (75, 65), (37, 32)):
        image = image.resize(size, Image.BOX)
    image = image.crop((2, 0, 34, 32))
    read, = fid.ImageSet(tmp_path, 32).batches(range(1), 1)
    assert np.array_equal(read[0].permute(1, 2, 0), image)


def test_the_same_files_on_both_sides_are_told(tmp_path, monkeypatch, capsys, resnet):
    ref = folder_of(tmp_path / "ref", noise(5))
    folder_of(ref / "drawn", noise(5, seed=1))
    (tmp_path / "link").symlink_to(ref)
    other = folder_of(tmp_path / "ref2", noise(5))
    for samples, told in ((ref, True), (ref / "drawn", True), (tmp_path / "link", True), (other, False)):
        out = evaluate(monkeypatch, capsys, ref, samples, "--metrics", "fid", *resnet)
        assert ("same, or one is part of the other" in out) == told, samples


def test_two_images_beside_statistics_give_only_what_these_do(tmp_path, monkeypatch, capsys, resnet):
    ref = folder_of(tmp_path / "ref", noise(5))
    evaluate(monkeypatch, capsys, ref, "--save-stats", tmp_path / "stats.npz", *resnet)
    np.savez(tmp_path / "two.npz", arr_0=noise(2), **np.load(tmp_path / "stats.npz"))
    out = evaluate(monkeypatch, capsys, tmp_path / "two.npz", ref, *resnet)
    assert "fd_resnet18" in out and "kid" not in out and "recall" not in out
    save = ["--save-stats", tmp_path / "x.npz"]
    for flags, words in (([tmp_path / "two.npz", ref, "--metrics", "kid"], "--metrics kid"),
                         ([tmp_path / "two.npz", *save], "--save-stats: .*and 2 images"),
                         ([ref, *save, "--reconstruct"], "--reconstruct go with --ckpt")):
        with pytest.raises(UserError, match=words):
            evaluate(monkeypatch, capsys, *flags, *resnet)


def test_three_images_are_no_distribution(tmp_path, monkeypatch, capsys, resnet):
    ref, three = folder_of(tmp_path / "ref", noise(4)), folder_of(tmp_path / "three", noise(3))
    with pytest.raises(UserError, match="three: 3 image.*at least four"):
        evaluate(monkeypatch, capsys, ref, three, *resnet)
    out = evaluate(monkeypatch, capsys, ref, folder_of(tmp_path / "four", noise(4)), *resnet)
    assert "fd_resnet18" in out and "precision                   1" in out and "4 images are too few" in out


# --- Statistics and other files ---------------------------------------------------------------------------------------

def test_npz_is_read_in_pieces(tmp_path):
    a = smooth_pictures(7, 16)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=a)
        source = fid.ImageSet(tmp_path / "a.npz")
        assert torch.equal(torch.cat(list(source.batches(range(2, 7), 2, 0))), nchw(a)[2:])
        assert torch.equal(torch.cat(list(source.batches(range(7), 3, 2))), nchw(a))


def test_fewer_images_than_an_npz_announces(tmp_path):
    """A header that says 6 over the data of 5: an error, not a metric over 5."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("arr_0.npy", "w") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=(6, 16, 16, 3)))
        f.write(noise(5).tobytes())
    source = fid.ImageSet(tmp_path / "a.npz")
    assert source.n == 6 and len(next(source.batches(range(0, 5), 5))) == 5
    for batch_size in (1, 2, 6):
        with pytest.raises(UserError, match="a.npz: damaged"):
            list(source.batches(range(6), batch_size))


def test_statistics_beside_other_arrays_are_read(tmp_path):
    """mu, sigma first; features, counts and pickled objects beside them are left alone. Distance of two normal
    distributions with one covariance: the squared distance of their means."""
    cov, mean = np.diag(np.linspace(1, 2, 2048)), np.zeros(2048)
    np.savez(tmp_path / "a.npz", mu=mean, sigma=cov, features=np.zeros((24, 2048)), n=np.arange(3),
             names=np.array([{"pickled": 1}], dtype=object))
    line, = fid.check([fid.ImageSet(tmp_path / "a.npz")], INCEPTION)
    assert "ADM's (TensorFlow's resize)" in line and "pytorch-fid" in line
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    np.savez(a, mu=mean[:64], sigma=cov[:64, :64], features=np.zeros((24, 64)), n=np.arange(3))
    np.savez(b, mu=mean[:64] + 0.5, sigma=cov[:64, :64])
    small = SimpleNamespace(name="small", sha256="b" * 64, channels=64, size=32)
    found = fid.evaluate([fid.ImageSet(a), fid.ImageSet(b)], small, ["fid"], device=CPU, batch_size=4)
    assert found["fd_small"] == pytest.approx(64 * 0.25, rel=1e-6)


def test_what_unmarked_statistics_are_taken_for(tmp_path):
    adm = dict(mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    np.savez(tmp_path / "adm.npz", **adm)                                          # ADM's own: no doubt
    assert fid.check([fid.ImageSet(tmp_path / "adm.npz")], INCEPTION) == []
    other = SimpleNamespace(name="resnet18", sha256="b" * 64, channels=512, size=224)
    np.savez(tmp_path / "small.npz", mu=np.zeros(512), sigma=np.eye(512))
    line, = fid.check([fid.ImageSet(tmp_path / "small.npz")], other)
    assert "small.npz: unmarked statistics, taken for resnet18's" in line
    resnet50 = SimpleNamespace(name="resnet50", sha256="c" * 64, channels=2048, size=224)     # as wide, not Inception
    with pytest.raises(UserError, match="inception's 2048 features.*not of resnet50's"):
        fid.check([fid.ImageSet(tmp_path / "adm.npz")], resnet50)
    np.savez(tmp_path / "both.npz", arr_0=noise(4), **adm)                      # its images can be used
    both = fid.ImageSet(tmp_path / "both.npz")
    fid.check([both], resnet50)
    assert both.given == {} and both.n == 4


def test_saved_statistics_say_what_they_are(tmp_path, monkeypatch, capsys, resnet):
    images = noise(6, seed=1)
    ref, samples = folder_of(tmp_path / "ref", images), folder_of(tmp_path / "s", noise(6, 24))
    direct = evaluate(monkeypatch, capsys, ref, samples, "--metrics", "fid", *resnet)
    evaluate(monkeypatch, capsys, ref, "--save-stats", tmp_path / "stats.npz", *resnet)
    saved = evaluate(monkeypatch, capsys, tmp_path / "stats.npz", samples, "--metrics", "fid", *resnet)
    number = [next(line for line in out.splitlines() if "fd_resnet18" in line) for out in (direct, saved)]
    assert number[0] == number[1] and "unmarked" not in saved
    assert "differ in size (height, width): [(16, 16), (24, 24)]" in saved
    assert "stats.npz: 6 images are too few" in saved
    stats = dict(np.load(tmp_path / "stats.npz"))
    np.savez(tmp_path / "older.npz", **stats | dict(sha256="0" * 64))
    with pytest.raises(UserError, match="older.npz: statistics of resnet18's 512 features .00000000., not of"):
        evaluate(monkeypatch, capsys, tmp_path / "older.npz", samples, "--metrics", "fid", *resnet)
    np.savez(tmp_path / "foreign.npz", mu=stats["mu"], sigma=stats["sigma"])       # saved again: like ours
    with pytest.raises(UserError, match="--save-stats: .*foreign.npz holds statistics already"):
        evaluate(monkeypatch, capsys, tmp_path / "foreign.npz", "--save-stats", tmp_path / "x.npz", *resnet)


@pytest.mark.parametrize("name", ["stats.pkl", "stats.npy", "samples.zip", "picture.png", "nameless"])
def test_a_file_of_another_type(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"{name}: a file of type .*; give a folder or an .npz"):
        fid.ImageSet(tmp_path / name)


def test_a_pickle_called_npz(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"\x80\x04}\x94.")
    with pytest.raises(UserError, match="a.npz: not a readable .npz"):
        fid.ImageSet(tmp_path / "a.npz")
