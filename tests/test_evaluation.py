"""fid.py against torch-fidelity, scipy and counting."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import fid
from conftest import close
from vae import UserError


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


def smooth_pictures(n, size, seed=0, blur=4):
    """Random smooth pictures uint8 [n, size, size, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, blur, blur, 3), dtype=np.uint8)
    return np.stack([np.array(Image.fromarray(c).resize((size, size), Image.BICUBIC)) for c in coarse])


def nchw(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.fixture(scope="session")
def inception(inception_file):
    return fid.Inception(inception_file)


def peer(inception_file, features):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    return module.FeatureExtractorInceptionV3("inception", features, feature_extractor_weights_path=str(inception_file))


@pytest.mark.parametrize("size", [32, 64, 256, 299])
def test_inception_features_match_torch_fidelity(inception, inception_file, size):
    images = nchw(smooth_pictures(3, size, seed=size, blur=16))
    caught = []
    hook = inception.net.Mixed_6e.register_forward_hook(lambda m, x, y: caught.append(y.mean((2, 3))))
    with torch.no_grad():
        ours = inception(images)
        theirs = peer(inception_file, ["768", "2048", "logits_unbiased", "logits"])(images)
    hook.remove()
    assert 0.01 < theirs[1].std() < 100                           # the random weights neither vanish nor explode
    close(caught[0], theirs[0], 1e-4)
    close(ours["pool"], theirs[1], 1e-4)
    close(ours["logits"], theirs[2], 1e-4)
    close(ours["logits"] + inception.net.fc.bias, theirs[3], 1e-4)


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


def rows(n, d, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / d ** 0.5 + shift) ** 2).float()


def test_metrics_match_torch_fidelity():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    a, b = rows(1000, 128, 1), rows(1000, 128, 2, 0.1)
    moments = [fid.Moments(128), fid.Moments(128)]
    for m, f in zip(moments, (a, b)):
        for i in range(0, 1000, 70):
            m.add(f[i:i + 70], i)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(f) for f in (a, b)), False)
    ours = fid.frechet_distance(*moments[0].result(), *moments[1].result())
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)

    for n, m, size in ((1000, 1000, 1000), (900, 700, 300)):
        theirs = kid_features_to_metric(a[:n], b[:m], kid_subsets=20, kid_subset_size=size, rng_seed=2020, verbose=False)
        ours = fid.kid(a[:n], b[:m], subsets=20, size=size)
        assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)

    logits = 3 * torch.randn(1000, 1008, generator=torch.Generator().manual_seed(0))
    score = fid.InceptionScore(1000)
    for i in range(0, 1000, 64):
        score.add(logits[i:i + 64], i)
    theirs = isc_features_to_metric(logits, splits=1, shuffle=False)
    assert score.result() == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


def test_inception_score_in_splits_of_5000():
    logits = 2 * torch.randn(7000, 1008, generator=torch.Generator().manual_seed(1))
    score = fid.InceptionScore(7000)
    for i in range(0, 7000, 999):                                  # a batch lies across the split
        score.add(logits[i:i + 999], i)
    p = logits.double().softmax(1)
    by_hand = [(q * (q.log() - q.mean(0).log())).sum(1).mean().exp() for q in (p[:5000], p[5000:])]
    assert score.result() == pytest.approx(sum(by_hand).item() / 2, rel=1e-9)


def test_frechet_distance_against_scipy_and_closed_form():
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    rng = np.random.default_rng(0)
    for rank in (64, 20):                                          # 20: singular covariances, as of few images
        (m1, c1), (m2, c2) = ((rng.standard_normal(64), np.cov(rng.standard_normal((64, rank + 1)) * 3)) for _ in "ab")
        ours = fid.frechet_distance(*map(torch.from_numpy, (m1, c1, m2, c2)))
        eps = 1e-9 * np.eye(64)
        root = np.trace(sqrtm((c1 + eps) @ (c2 + eps))).real
        assert ours == pytest.approx(((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * root, rel=1e-5)
    d1, d2 = rng.random(50), rng.random(50)                        # commuting covariances: sum (sqrt d1 - sqrt d2)^2
    q = np.linalg.qr(rng.standard_normal((50, 50)))[0]
    ours = fid.frechet_distance(torch.zeros(50).double(), torch.from_numpy(q * d1 @ q.T),
                                torch.full((50,), 2.0).double(), torch.from_numpy(q * d2 @ q.T))
    assert ours == pytest.approx(200 + ((d1 ** 0.5 - d2 ** 0.5) ** 2).sum(), rel=1e-10)
    same = torch.from_numpy(c1)
    assert abs(fid.frechet_distance(torch.zeros(64), same, torch.zeros(64), same)) < 1e-5


def test_precision_and_recall_by_counting():
    a, b = rows(230, 16, 3).numpy().astype(np.float64), rows(170, 16, 4, 0.3).numpy().astype(np.float64)

    def radius(x, i):
        return sorted(((x[i] - x[j]) ** 2).sum() for j in range(len(x)))[3]

    ra, rb = [radius(a, i) for i in range(len(a))], [radius(b, i) for i in range(len(b))]
    precision = np.mean([any(((y - x) ** 2).sum() <= r for x, r in zip(a, ra)) for y in b])
    recall = np.mean([any(((y - x) ** 2).sum() <= r for y, r in zip(b, rb)) for x in a])
    ours = fid.precision_recall(torch.from_numpy(a).float(), torch.from_numpy(b).float(), block=64)
    assert 0.05 < precision < 0.95 and 0.05 < recall < 0.95
    assert ours == pytest.approx((precision, recall), abs=1e-9)


def test_ssim_against_gaussian_filter():
    ndimage = pytest.importorskip("scipy.ndimage")
    x, y = smooth_pictures(2, 40, 1) / 255, smooth_pictures(2, 40, 2) / 255
    for n in range(2):
        values = []
        for c in range(3):
            def blur(z):
                return ndimage.gaussian_filter(z, 1.5, truncate=3.5)[5:-5, 5:-5]
            a, b = x[n, ..., c], y[n, ..., c]
            ma, mb = blur(a), blur(b)
            va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
            values.append(((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4))).mean())
        ours = fid.ssim(*(torch.from_numpy(z[n:n + 1] * 2 - 1).permute(0, 3, 1, 2) for z in (x, y)))
        assert ours.item() == pytest.approx(np.mean(values), abs=1e-9)


def test_resizes_are_those_of_the_authors():
    images = nchw(smooth_pictures(1, 300, 5, blur=40))
    net = fid.TimmFeatures.__new__(fid.TimmFeatures)               # the resize of any timm encoder is Pillow's
    nn.Module.__init__(net)
    net.size, net.mode, net.mean, net.std = 64, "bicubic", torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    net.net = SimpleNamespace(forward_features=lambda x: x, forward_head=lambda x, pre_logits: x)
    pillow = nchw(np.array(Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((64, 64), Image.BICUBIC))[None])
    difference = (net(images)["pool"] - pillow.float()).abs()
    assert difference.max() <= 1 and difference.mean() < 0.01
    ramp = torch.arange(4, dtype=torch.uint8).mul(10).view(1, 1, 1, 4).expand(1, 3, 2, 4)
    assert fid.resize_tf1(ramp, 8)[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]      # corners not centred


def save_folder(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def run_fid(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, flags), "--device", "cpu", "--num-workers", "0"])
    fid.main()


def test_command_line_on_folders_npz_and_statistics(tmp_path, monkeypatch, inception_file, capsys):
    a, b = smooth_pictures(12, 32, 1), smooth_pictures(10, 32, 2, blur=6)
    save_folder(tmp_path / "a", a)
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez_compressed(tmp_path / "b.npz", arr_0=b)
    with_inception = ("--inception-weights", inception_file)
    results, metrics = [], (",".join(fid.METRICS), "fid,is,kid,precision,recall", "fid,sfid,is")
    run_fid(monkeypatch, tmp_path / "a", "--save-stats", tmp_path / "stats.npz", *with_inception)
    for i, ref in enumerate(("a", "a.npz", "stats.npz")):
        run_fid(monkeypatch, tmp_path / ref, tmp_path / "b.npz", "--json", tmp_path / "out.json", "--batch-size", 3 + 4 * i,
                "--metrics", metrics[i], *with_inception)
        results.append(json.loads((tmp_path / "out.json").read_text()))
    for i, run in enumerate(results):
        assert set(run) & set(fid.METRICS) == set(metrics[i].split(","))
        assert all(run[name] == pytest.approx(results[0][name], rel=1e-4) for name in metrics[i].split(","))
    assert results[0]["n_samples"] == 10 and results[0]["n_reference"] == 12 and results[0]["resolution"] == [32, 32]
    assert "images of 32x32 pixels, resized to 299x299" in capsys.readouterr().out

    stats = np.load(tmp_path / "stats.npz")                        # statistics in an ADM batch are used as given
    np.savez(tmp_path / "adm.npz", arr_0=a, mu=stats["mu"] + 1, sigma=stats["sigma"], mu_s=stats["mu_s"],
             sigma_s=stats["sigma_s"])
    run_fid(monkeypatch, tmp_path / "adm.npz", tmp_path / "a", "--json", tmp_path / "out.json", "--metrics",
            "fid,precision,recall", *with_inception)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["fid"] == pytest.approx(2048, rel=1e-4)
    assert result["precision"] == result["recall"] == 1

    with pytest.raises(UserError, match="other weights|statistics of inception"):
        run_fid(monkeypatch, tmp_path / "stats.npz", tmp_path / "b.npz", "--features", "resnet18",
                "--features-weights", resnet_file(tmp_path))
    run_fid(monkeypatch, tmp_path / "adm.npz", tmp_path / "b.npz", "--features", "resnet18", "--features-weights",
            resnet_file(tmp_path), "--json", tmp_path / "out.json")
    assert "fd_resnet18" in json.loads((tmp_path / "out.json").read_text())


def resnet_file(folder):
    torch.manual_seed(1)
    torch.save(timm.create_model("resnet18").state_dict(), folder / "resnet18.pth")
    return folder / "resnet18.pth"


def test_dinov2_features_are_the_class_token_at_224(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("vit_small_patch14_dinov2.lvd142m", img_size=224, depth=2)
    torch.save(net.state_dict(), tmp_path / "dino.pth")
    create = timm.create_model
    small = fid.timm.create_model
    try:
        fid.timm.create_model = lambda name, **kw: small(name, depth=2, **kw)
        ours = fid.TimmFeatures("vit_small_patch14_dinov2.lvd142m", str(tmp_path / "dino.pth"))
    finally:
        fid.timm.create_model = create
    images = nchw(smooth_pictures(2, 224))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        token = net.eval().forward_features((images / 255 - mean) / std)[:, 0]
        close(ours(images)["pool"], token, 1e-4)
    assert ours.size == 224 and ours.width == 384


def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, capsys):
    good = save_folder(tmp_path / "good", smooth_pictures(4, 32))
    weights = ("--features", "resnet18", "--features-weights", resnet_file(tmp_path), "--metrics", "fid")

    def fails(match, *flags):
        with pytest.raises(UserError, match=match) as e:
            run_fid(monkeypatch, *flags)
        assert "\n" not in str(e.value)

    mixed = save_folder(tmp_path / "mixed", smooth_pictures(3, 32))
    Image.new("RGB", (40, 32)).save(mixed / "x.png")
    fails("x.png: 40x32 pixels, but .*000.png has 32x32", good, mixed, *weights)
    run_fid(monkeypatch, good, mixed, *weights, "--resolution", 32)
    corrupt = save_folder(tmp_path / "corrupt", smooth_pictures(5, 32))
    (corrupt / "003.png").write_bytes((corrupt / "003.png").read_bytes()[:200])
    fails("003.png: cannot be read", good, corrupt, *weights)
    fails("1 image.*at least two", save_folder(tmp_path / "one", smooth_pictures(1, 32)), good, *weights)
    np.savez(tmp_path / "other.npz", images=smooth_pictures(3, 32))
    fails("neither arr_0", tmp_path / "other.npz", good, *weights)
    np.savez(tmp_path / "float.npz", arr_0=smooth_pictures(3, 32) / 255)
    fails("arr_0 is float64", tmp_path / "float.npz", good, *weights)
    np.savez(tmp_path / "wide.npz", mu=np.zeros(64), sigma=np.eye(64))
    fails("statistics of 64 features, resnet18 has 512", tmp_path / "wide.npz", good, *weights)
    np.savez(tmp_path / "nan.npz", mu=np.full(512, np.nan), sigma=np.eye(512))
    fails("not finite", tmp_path / "nan.npz", good, *weights)
    (tmp_path / "junk.npz").write_bytes(b"PK junk")
    fails("not a readable .npz", tmp_path / "junk.npz", good, *weights)
    fails("no such", tmp_path / "nowhere", good, *weights)
    fails("--metrics is is defined on Inception", good, good, *weights[:4], "--metrics", "is")
    fails("--metrics fdi: unknown", good, good, "--metrics", "fdi")
    fails("SAMPLES is missing", good)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    fails("bring|give .*pt_inception-2015-12-05-6726825d.pth", good, good, "--features", "inception")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    fails("--download: cannot fetch .*--inception-weights FILE", good, good, "--download")

    state = torch.load(tmp_path / "resnet18.pth")
    state["conv1.weight"][0, 0, 0, 0] = math.nan
    torch.save(state, tmp_path / "resnet18.pth")
    fails("features of image 0 are not finite", good, good, "--features", "resnet18", "--features-weights",
          tmp_path / "resnet18.pth")


def no_network(*args, **kwargs):
    raise OSError("no network")


def test_grey_palette_and_alpha_are_read_as_rgb(tmp_path):
    folder = save_folder(tmp_path / "f", smooth_pictures(1, 8))
    Image.new("L", (8, 8), 100).save(folder / "grey.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(folder / "transparent.png")
    Image.new("RGB", (8, 8), (10, 20, 30)).quantize().save(folder / "palette.png")
    source = fid.ImageSet(folder)
    images = torch.cat(list(source.batches(range(4), 3, 1)))
    assert source.tallies[0] == 3                                  # sorted: 000, grey, palette, transparent
    assert images[1].unique().tolist() == [100] and images[3].unique().tolist() == [255]
    assert images[2, :, 0, 0].tolist() == [10, 20, 30]


def test_npz_is_read_in_pieces(tmp_path):
    a = smooth_pictures(7, 16)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=a)
        source = fid.ImageSet(tmp_path / "a.npz")
        assert torch.equal(torch.cat(list(source.batches(range(2, 7), 2, 0))), nchw(a)[2:])
        assert torch.equal(torch.cat(list(source.batches(range(7), 3, 2))), nchw(a))
