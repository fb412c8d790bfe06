"""fid.py against torch-fidelity, scipy and counting."""
import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import fid
import repa
import vae
from conftest import close, one_line


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
    return module.FeatureExtractorInceptionV3("inception", features,
                                              feature_extractor_weights_path=str(inception_file))


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
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / d ** 0.5
    return torch.from_numpy((x + shift) ** 2).float()


def test_metrics_match_torch_fidelity():
    pytest.importorskip("torch_fidelity")
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


def test_inception_score_in_splits_of_5000():
    logits = 2 * torch.randn(7000, 1008, generator=torch.Generator().manual_seed(1))
    p = logits.double().softmax(1)
    by_hand = [(q * (q.log() - q.mean(0).log())).sum(1).mean().exp() for q in (p[:5000], p[5000:])]
    assert fid.inception_score(logits) == pytest.approx(sum(by_hand).item() / 2, rel=1e-9)


def test_frechet_distance_against_scipy_and_closed_form():
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
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
            top, bottom = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4), (ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)
            values.append((top / bottom).mean())
        ours = vae.ssim(*(torch.from_numpy(z[n:n + 1] * 2 - 1).permute(0, 3, 1, 2) for z in (x, y)))
        assert ours.item() == pytest.approx(np.mean(values), abs=1e-9)


def test_psnr_in_closed_form():
    """Peak 2; values beyond [-1, 1] count as those ends; one number an image."""
    x, y = torch.zeros(2, 3, 4, 4), torch.tensor([0.1, 3.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert vae.psnr(x, y).tolist() == pytest.approx([20 * math.log10(2 / 0.1), 20 * math.log10(2)], rel=1e-5)


def test_chroma_error_is_that_of_pillows_ycbcr():
    """Against Pillow's conversion of colours constant over blocks of 4 x 4 pixels (it rounds to levels); what
    only moves pixels about within a block is no error."""
    colours = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    images = colours.repeat(4, 2).repeat(4, 3)                                          # [2, 3, 32, 32, 3]
    chroma = [[np.asarray(Image.fromarray(image).convert("YCbCr"), float)[..., 1:] for image in half]
              for half in images]
    expected = np.abs(np.subtract(*chroma)).mean((1, 2, 3))
    x, y = torch.from_numpy(images).permute(0, 1, 4, 2, 3) / 127.5 - 1
    assert vae.chroma_error(x, y).numpy() == pytest.approx(expected, abs=0.3)
    noise = 0.5 * torch.rand(1, 3, 4, 4)
    assert vae.chroma_error(noise, noise.flip(2, 3)).item() < 1e-4 < vae.chroma_error(noise, noise.flip(1)).item()


def test_resizes_are_those_of_the_authors():
    """Any timm encoder's is Pillow's; the Inception's is TensorFlow 1's."""
    images = nchw(smooth_pictures(1, 300, 5, blur=40))
    encoder = repa.FrozenEncoder("resnet18", random=True)
    seen = []
    encoder.net.forward_features = lambda x: seen.append(x) or torch.zeros(1, 512, 7, 7)
    encoder.pooled(images)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    kernel = Image.BILINEAR if encoder.mode == "bilinear" else Image.BICUBIC
    pillow = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((224, 224), kernel)
    difference = ((seen[0] * std + mean) * 255 - nchw(np.array(pillow)[None]).float()).abs()
    assert encoder.size == 224 and difference.max() <= 1.01 and difference.mean() < 0.01
    ramp = torch.arange(4, dtype=torch.uint8).mul(10).view(1, 1, 1, 4).expand(1, 3, 2, 4)
    assert fid.resize_tf1(ramp, 8)[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]  # corners not centred


def save_folder(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


FLAGS = ("--device", "cpu", "--num-workers", "0")


@pytest.fixture(scope="session")
def resnet_file(tmp_path_factory):
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("resnet") / "resnet18.pth"
    torch.save(timm.create_model("resnet18").state_dict(), file)
    return file


def test_command_line_on_folders_npz_and_statistics(tmp_path, command, inception_file, resnet_file):
    """The same numbers whatever form the images come in and however they are batched."""
    a, b = smooth_pictures(12, 32, 1), smooth_pictures(10, 32, 2, blur=6)
    save_folder(tmp_path / "a", a)
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez_compressed(tmp_path / "b.npz", arr_0=b)
    with_inception = ("--inception-weights", inception_file, *FLAGS)

    def numbers(ref, samples, *flags):
        command("fid", ref, samples, "--json", "out.json", *flags)
        return json.loads((tmp_path / "out.json").read_text())

    results, metrics = [], (",".join(fid.METRICS), "is,kid,precision,recall", "fid")
    command("fid", "a", "--save-stats", "stats.npz", *with_inception)
    for i, ref in enumerate(("a", "a.npz", "stats.npz")):
        results.append(numbers(ref, "b.npz", "--batch-size", 3 + 4 * i, "--metrics", metrics[i], *with_inception))
    for i, result in enumerate(results):
        assert set(result) & set(fid.METRICS) == set(metrics[i].split(","))
        assert all(result[name] == pytest.approx(results[0][name], rel=1e-4) for name in metrics[i].split(","))
    assert results[0]["n_samples"] == 10 and results[0]["n_reference"] == 12 and results[0]["resolution"] == [32, 32]
    net = fid.Inception(inception_file)  # against one pass over all, and numpy's covariance
    with torch.no_grad():
        found = [net(nchw(images)) for images in (a, b)]
    stats = np.load(tmp_path / "stats.npz")
    for mu, sigma, key in (("mu", "sigma", "pool"), ("mu_s", "sigma_s", "spatial")):
        close(stats[mu], found[0][key].numpy().mean(0), 1e-4)
        close(stats[sigma], np.cov(found[0][key].double().numpy().T), 1e-3)
    assert results[0]["is"] == pytest.approx(fid.inception_score(found[1]["logits"]), rel=1e-3)
    assert results[0]["precision"] == fid.precision_recall(found[0]["pool"], found[1]["pool"])[0]

    np.savez(tmp_path / "adm.npz", arr_0=a, mu=stats["mu"] + 1, sigma=stats["sigma"], mu_s=stats["mu_s"],
             sigma_s=stats["sigma_s"])  # statistics in an ADM batch are used as given
    result = numbers("adm.npz", "a", "--metrics", "fid,precision,recall", *with_inception)
    assert result["fid"] == pytest.approx(2048, rel=1e-4) and result["precision"] == result["recall"] == 1

    with_resnet = ("--features", "resnet18", "--features-weights", resnet_file, *FLAGS)
    one_line(command("fid", "stats.npz", "b.npz", *with_resnet, code=2), "statistics of inception")
    assert "fd_resnet18" in numbers("adm.npz", "b.npz", *with_resnet)


def test_dinov2_features_are_the_class_token_at_224(tmp_path, monkeypatch):
    torch.manual_seed(0)
    name, create = "vit_small_patch14_dinov2.lvd142m", timm.create_model
    net = create(name, img_size=224, depth=2)
    torch.save(net.state_dict(), tmp_path / "dino.pth")
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, depth=2, **kwargs))
    ours = repa.FrozenEncoder(name, ckpt=tmp_path / "dino.pth")
    images = nchw(smooth_pictures(2, 224))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        token = net.eval().forward_features((images / 255 - mean) / std)[:, 0]
        close(ours.pooled(images), token, 1e-4)
    assert ours.size == 224 and ours.channels == 384


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


def test_npz_is_read_in_pieces(tmp_path):
    a = smooth_pictures(7, 16)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=a)
        source = fid.ImageSet(tmp_path / "a.npz")
        assert torch.equal(torch.cat(list(source.batches(range(2, 7), 2, 0))), nchw(a)[2:])
        assert torch.equal(torch.cat(list(source.batches(range(7), 3, 2))), nchw(a))
