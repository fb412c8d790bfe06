"""fid.py against torch-fidelity, scipy and counting; and on what people hand to it."""
import json
import math
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
from conftest import CPU, close, nchw, needs, one_line, smooth_images
from data.images import read_image
from sample import choose_labels
from support.commands import UserError
from support.devices import Processes

FLAGS = ("--device", "cpu", "--num-workers", "0")


def noise(n, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def save_folder(folder, images):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random Inception weights whose batch norms were fitted to images, so that activations keep their
    size."""
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
        net.train()(F.interpolate(nchw(smooth_images(6, 64, seed=9)).float(), size=(160, 160)) / 128 - 1)
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), file)
    return file


@pytest.fixture(scope="session")
def inception(inception_file):
    return fid.Inception(inception_file)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The flags of a small feature network, test_resnet (96 features), with random weights."""
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("small") / "test_resnet.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    return ["--features", "test_resnet", "--features-weights", str(file), *FLAGS]


# --- Features -----------------------------------------------------------------------------------------------

@needs("torch_fidelity")
def test_inception_features_match_torch_fidelity(inception, inception_file):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    peer = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"],
                                       feature_extractor_weights_path=str(inception_file))
    images, branches = nchw(smooth_images(2, 64, blur=16)), []
    peer.Mixed_6d.branch1x1.register_forward_hook(lambda m, x, y: branches.append(y))       # [2, 192, 17, 17]
    with torch.no_grad():
        ours, (pool, logits) = inception(images), peer(images)
    assert 0.01 < pool.std() < 100  # the random weights neither vanish nor explode
    close(ours["pool"], pool, 1e-4)
    close(ours["logits"], logits, 1e-4)
    close(ours["spatial"], branches[0][:, :7].permute(0, 2, 3, 1).flatten(1), 1e-4)


def test_resize_is_tensorflow_1s():
    ramp = torch.arange(4, dtype=torch.uint8).mul(10).view(1, 1, 1, 4).expand(1, 3, 2, 4)
    assert fid.resize_tf1(ramp, 8)[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]  # corners not centred


@pytest.mark.parametrize("mode, kernel", [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)])
def test_resize_is_pillows(mode, kernel):
    images = noise(1, 75)
    found, pillow = fid.resize_pillow(nchw(images), 32, mode), Image.fromarray(images[0]).resize((32, 32),
                                                                                                 kernel)
    difference = (found - nchw(np.array(pillow)[None]).float()).abs()
    assert difference.max() <= 1 and difference.mean() < 0.01 and torch.equal(found, found.round())


@torch.no_grad()
def test_pooled_features_are_dinov2s_class_token_at_224(tmp_path, monkeypatch):
    name, create = "vit_small_patch14_dinov2.lvd142m", timm.create_model
    net = create(name, img_size=224, depth=1).eval()
    torch.save(net.state_dict(), tmp_path / "dino.pth")
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, depth=1, **kwargs))
    ours, images = fid.PooledFeatures("dinov2-vit-s", str(tmp_path / "dino.pth")), nchw(smooth_images(2, 224))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    close(ours(images)["pool"], net.forward_features((images / 255 - mean) / std)[:, 0], 1e-4)
    assert (ours.size, ours.outputs, fid.metric_name(ours, "fid")) == (224, dict(pool=384), "fd_dinov2-vit-s")


def switches():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu")


def test_features_are_full_float32_under_autocast_and_tf32(inception, small):
    images, seen, pooled = nchw(smooth_images(2, 64)), [], fid.PooledFeatures("test_resnet", small[3])
    plain = [net(images)["pool"] for net in (inception, pooled)]
    layers = [layer for net in (inception, pooled) for layer in net.net.modules()]
    before, modules = switches(), (torch.backends.cuda.matmul, torch.backends.cudnn)
    hooks = [layer.register_forward_hook(lambda *_: seen.append(switches())) for layer in layers]
    for module in modules:
        module.allow_tf32 = True
    with torch.autocast("cpu", torch.bfloat16):
        features = [net(images)["pool"] for net in (inception, pooled)]
        after = switches()
    for module, value in zip(modules, before, strict=False):       # before: autocast's switch, too
        module.allow_tf32 = value
    for hook in hooks:
        hook.remove()
    assert after == (True, True, True) and all(map(torch.equal, features, plain))
    assert len(seen) > 200 and set(seen) == {(False, False, False)}


def test_samples_are_those_of_sample_py_bit_for_bit(short_run, tmp_path, command):
    """With the same flags, in two batches; SiT runs with TF32, the feature network without."""
    flags = ["--ckpt", str(short_run / "exps/a/checkpoints/0000004.pt"), "--no-ema", "--num-samples", "10",
             "--num-steps", "2", "--seed", "3", "--label-sampling", "random", "--device", "cpu"]
    command("sample", *flags, "--batch-size", "7", "--out", "x.npz")
    _, samples, _ = fid.open_sources(fid.parse_args(flags), CPU, Processes())
    assert torch.equal(torch.cat([*samples.batches(range(10), 7)]),
                       nchw(np.load(tmp_path / "x.npz")["arr_0"]))
    by_default = fid.open_sources(fid.parse_args([*flags[:2], "--device", "cpu"]), CPU, Processes())[1]
    assert by_default.n == 24                                                     # as the training images
    seen = {}
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.setdefault(type(module).__name__, set()).add(switches()))
    command("fid", *flags, "--features", repa.LITE2, "--metrics", "fid", *FLAGS)
    hook.remove()
    assert seen["SiT"] == {(True, True, False)} and seen["InvertedResidual"] == {(False, False, False)}


# --- Metrics ------------------------------------------------------------------------------------------------

def rows(n, d, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / d ** 0.5
    return torch.from_numpy((x + shift) ** 2).float()


@needs("torch_fidelity")
def test_kid_matches_torch_fidelity():
    from torch_fidelity.metric_kid import kid_features_to_metric
    a, b = rows(1000, 128, 1), rows(900, 128, 2, 0.1)
    theirs = kid_features_to_metric(a, b, kid_subsets=20, kid_subset_size=300, rng_seed=2020, verbose=False)
    ours = fid.kid(a, b, subsets=20, size=300)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)


def close_together(x):
    """Features 0.1% of their norm apart, whose distances and kernels float32 would lose."""
    return (1e-3 * x + 1).float().numpy().astype(np.float64)


def test_kid_of_whole_sets():
    """Each subset is the whole set: the unbiased estimate."""
    x, y = close_together(rows(30, 8, 5)), close_together(rows(30, 8, 6, 0.2))
    xx, yy, xy = ((a @ b.T / 8 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = sum(k[~np.eye(30, dtype=bool)].mean() for k in (xx, yy))
    ours = fid.kid(torch.from_numpy(x).float(), torch.from_numpy(y).float(), subsets=3)
    assert ours == pytest.approx(within - 2 * xy.mean(), rel=1e-5)


def test_inception_score_over_equal_splits_of_about_5000():
    logits = 2 * torch.randn(8001, 20, generator=torch.Generator().manual_seed(1))
    p = logits.double().softmax(1)
    by_hand = [(q * (q.log() - q.mean(0).log())).sum(1).mean().exp() for q in p.split([4001, 4000])]
    assert fid.inception_score(logits) == pytest.approx(np.mean(by_hand), rel=1e-9)


def test_inception_score_shuffles_folders(tmp_path):
    """10 classes of 1000 certain images, sorted: a folder has all classes in both splits, so 10; an .npz
    keeps its order, as in ADM, and has 5."""
    logits = 50 * torch.eye(10).repeat_interleave(1000, 0)

    def net(x):
        return dict(pool=x[:, :2], logits=x)

    net.name, net.id, net.outputs = "inception", "inception", dict(pool=2, logits=10)
    source = SimpleNamespace(path=Path("x"), n=10_000, stats={}, batches=lambda *args: logits.split(1000))
    for source.is_folder, score in ((False, 5), (True, 10)):
        found = fid.evaluate({}, source, [(net, "is")], CPU, batch_size=1000)
        assert found["is"] == pytest.approx(score, rel=1e-2)
    np.savez(tmp_path / "x.npz", arr_0=noise(4))
    folder = fid.ImageSet(save_folder(tmp_path / "folder", noise(4)))
    assert folder.is_folder and fid.Reconstructions(Path("x.pt"), None, folder).is_folder
    assert not fid.ImageSet(tmp_path / "x.npz").is_folder


@pytest.mark.parametrize("rank", [64, 20])                              # 20: singular covariances, few images
def test_frechet_distance_against_scipy(rank):
    rng = np.random.default_rng(0)
    m1, m2 = rng.standard_normal((2, 64))
    c1, c2 = (np.cov(rng.standard_normal((64, rank + 1)) * 3) for _ in "ab")
    eps = 1e-9 * np.eye(64)
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * np.trace(sqrtm((c1 + eps) @ (c2 + eps))).real
    m1, c1, m2, c2 = map(torch.from_numpy, (m1, c1, m2, c2))
    assert fid.frechet_distance((m1, c1), (m2, c2)) == pytest.approx(expected, rel=1e-5)


def test_precision_and_recall_by_all_distances():
    a, b = close_together(rows(230, 16, 3)), close_together(rows(170, 16, 4, 0.3))
    aa, bb, ba = (((x[:, None] - y) ** 2).sum(2) for x, y in ((a, a), (b, b), (b, a)))
    precision = (ba <= np.sort(aa)[:, 3]).any(1).mean()      # the nearest of all is itself: column 3 is k = 3
    recall = (np.sort(bb)[:, 3] >= ba.T).any(1).mean()
    assert 0.05 < precision < 0.95 and 0.05 < recall < 0.95
    x, y = (torch.from_numpy(features).float() for features in (a, b))
    assert fid.precision(x, y, block=64) == pytest.approx(precision, abs=1e-9)
    assert fid.recall(x, y) == pytest.approx(recall, abs=1e-9)


# --- The command --------------------------------------------------------------------------------------------

def test_command_line_on_folders_npz_and_statistics(tmp_path, command, inception_file, inception, small):
    """The same numbers whatever form the images come in and however they are batched; all against one pass
    over all images, and numpy's covariance."""
    a, b = smooth_images(6, 32, 1), smooth_images(5, 32, 2, blur=6)
    save_folder(tmp_path / "a", a)
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez_compressed(tmp_path / "b.npz", arr_0=b)
    found, with_inception = {}, ("--inception-weights", inception_file, *FLAGS)
    command("fid", "a", "--save-stats", "stats.npz", *with_inception)
    for ref, size, metrics in (("a.npz", 3, "sfid,is,kid,precision,recall"), ("stats.npz", 11, "fid")):
        command("fid", ref, "b.npz", "--batch-size", size, "--metrics", metrics, "--json", "out.json",
                *with_inception)
        found |= json.loads((tmp_path / "out.json").read_text())
        assert (found["n_reference"], found["n_samples"], found["resolution"]) == (6, 5, [32, 32])
    with torch.no_grad():
        features = [inception(nchw(images)) for images in (a, b)]
    x, y = (f["pool"] for f in features)
    stats = np.load(tmp_path / "stats.npz")
    for mu, sigma, key, name in (("mu", "sigma", "pool", "fid"), ("mu_s", "sigma_s", "spatial", "sfid")):
        assert np.array_equal(stats[mu], stats[f"{inception.id} {mu}"])                     # also ADM's names
        p, q = (f[key].double() for f in features)
        close(stats[mu], p.mean(0), 1e-4)
        close(stats[sigma], torch.cov(p.T), 1e-3)
        a, b = ((f - f.mean(0)) / math.sqrt(len(f) - 1) for f in (p, q))          # covariances a^T a, b^T b
        root = torch.linalg.matrix_norm(a @ b.T, "nuc")                           # tr((a^T a b^T b)^(1/2))
        distance = (p.mean(0) - q.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * root
        assert found[name] == pytest.approx(distance.item(), rel=1e-3)
    assert found["is"] == pytest.approx(fid.inception_score(features[1]["logits"]), rel=1e-3)
    assert found["kid"] == pytest.approx(fid.kid(x, y), rel=1e-3)
    assert (found["precision"], found["recall"]) == (fid.precision(x, y), fid.recall(x, y))
    printed = command("fid", "stats.npz", "b.npz", *small, code=2)
    one_line(printed, f"of {inception.id} (2048 features)", "(96 features)")


def test_long_names_are_printed_apart_from_their_values(tmp_path, command):
    np.savez(tmp_path / "a.npz", arr_0=noise(5))
    np.savez(tmp_path / "b.npz", arr_0=noise(5, seed=1))
    printed = command("fid", "a.npz", "b.npz", "--metrics", "precision", "--features", repa.LITE2, *FLAGS)
    name, value = next(line.split() for line in printed.splitlines() if " precision" in line)
    assert name == "precision_efficientnet-lite2" and 0 <= float(value) <= 1


def test_bad_input_is_one_clear_line(tmp_path, command, monkeypatch, small):
    good = save_folder(tmp_path / "good", smooth_images(4, 32))

    def fails(words, *flags):
        one_line(command("fid", *flags, code=2), *words.split("|"))

    (save_folder(tmp_path / "corrupt", smooth_images(5, 32)) / "003.png").write_bytes(b"x")
    fails("003.png: cannot be read", "good", "corrupt", *small, "--num-workers", 2)
    Image.new("RGB", (40, 32)).save(save_folder(tmp_path / "mixed", smooth_images(3, 32)) / "x.png")
    fails("x.png: [32, 40] pixels|not [32, 32]", "good", "mixed", *small)
    for words, arrays in (("arr_0 is float64", dict(arr_0=noise(3) / 255)),
                          ("unknown (64 features)|(96 features)", dict(mu=np.zeros(64), sigma=np.eye(64))),
                          ("not finite", dict(mu=np.full(96, np.nan), sigma=np.eye(96))),
                          ("3 image(s)|four images or more", dict(arr_0=noise(3)))):
        np.savez(tmp_path / "bad.npz", **arrays)
        fails(f"bad.npz: |{words}", "good", "bad.npz", *small)
    fails("--metrics is: |sfid and is are defined on", "good", "good", *small, "--metrics", "is")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    fails("pt_inception-2015-12-05-6726825d.pth|--download", "good", "good", "--features", "inception")
    state = torch.load(small[3])
    state["conv1.0.weight"][0, 0, 0, 0] = math.nan
    torch.save(state, tmp_path / "nan.pth")
    fails("features not finite", "good", good, "--features", "test_resnet", "--features-weights", "nan.pth",
          *FLAGS)


def test_reconstructions_that_are_not_finite_are_refused(short_run, command):
    ckpt = torch.load(short_run / "exps/a/checkpoints/0000004.pt", weights_only=True)
    ckpt["vae"]["decoder.conv_out.weight"][:] = 3e38                                     # finite, still
    torch.save(ckpt, short_run / "overflow.pt")
    flags = ["--ckpt", "overflow.pt", "--reconstruct", "--features", repa.LITE2, *FLAGS]
    one_line(command("fid", *flags, cwd=short_run, code=2),
             "overflow.pt: the reconstruction of image 0 is not finite")


def test_few_samples_are_spread_over_the_classes(monkeypatch):
    """In any batches and processes, as by sample.py."""
    model, classes = SimpleNamespace(args=dict(resolution=8)), {}
    monkeypatch.setattr(fid, "sample_images", lambda model, indices, labels,
                        **kw: classes.update(zip(indices, labels, strict=True)))
    for shard in (range(2, 4), range(2)):
        list(fid.Samples(Path("x.pt"), model, choose_labels(4, range(10)), {}).batches(shard, 1))
    assert classes == {0: 0, 1: 2, 2: 5, 3: 7}


# --- Images and statistics in files -------------------------------------------------------------------------

def test_jpegs_are_cropped_exactly_as_in_adm(tmp_path):
    """Not by the JPEG decoder's own shrinking."""
    Image.fromarray(noise(1, 8)[0]).resize((300, 260), Image.BICUBIC).save(tmp_path / "0.jpg")
    read, = fid.ImageSet(tmp_path, 32).batches(range(1), 1)
    exact, fast = (read_image(tmp_path / "0.jpg", 32, fast) for fast in (False, True))
    assert torch.equal(read[0], exact) and not torch.equal(fast, exact)


def test_npz_is_read_in_shards_and_batches(tmp_path):
    a = smooth_images(7, 16)
    for save, workers in ((np.savez, 0), (np.savez_compressed, 2)):
        save(tmp_path / "a.npz", arr_0=a)
        source = fid.ImageSet(tmp_path / "a.npz")
        assert torch.equal(torch.cat(list(source.batches(range(2, 7), 2, workers))), nchw(a)[2:])


def test_npz_with_fewer_images_than_its_header_says(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("arr_0.npy", "w") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=(6, 16, 16, 3)))
        f.write(noise(5).tobytes())
    with pytest.raises(UserError, match="a.npz: damaged"):
        list(fid.ImageSet(tmp_path / "a.npz").batches(range(6), 4))


def test_statistics_of_unknown_origin(tmp_path):
    """They are assumed to be ADM's; other arrays in the file are not read. Beside images they count only if
    as wide."""
    def check(net, **arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        source = fid.ImageSet(tmp_path / "x.npz")
        fid.check_source(source, [net])
        return source, "".join(fid.find_warnings([source], [net]))

    inception = SimpleNamespace(name="inception", id="inception a", outputs=dict(pool=2048, spatial=2023))
    other = SimpleNamespace(name="resnet50", id="resnet50 a", outputs=dict(pool=2048))
    wide = dict(mu=np.ones(2048), sigma=np.eye(2048), names=np.array([{"pickled": 1}], dtype=object))
    adm = wide | dict(mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    assert check(inception, **adm)[1] == "" and "assumed to be inception's" in check(inception, **wide)[1]
    both, _ = check(inception, arr_0=noise(4), **adm)
    found = fid.collect(both, [(inception, "pool")], CPU, 4)[inception.id, "pool"]
    assert torch.equal(found[0], torch.ones(2048).double())
    with pytest.raises(UserError, match=r"of unknown \(2048 features\).*of resnet50 a \(2048"):
        check(other, **adm)
    assert fid.stored_statistics(check(other, arr_0=noise(4), **adm)[0], other, "pool") is None


def test_saved_statistics_name_their_network(tmp_path, command, small):
    save_folder(tmp_path / "ref", noise(6, seed=1))
    command("fid", "ref", "--save-stats", "stats.npz", *small)
    stats = dict(np.load(tmp_path / "stats.npz"))
    np.savez(tmp_path / "samples.npz", arr_0=noise(6, 24))
    assert "one is part of the other" in command("fid", "ref", "ref", "--metrics", "fid", *small)
    printed = command("fid", "stats.npz", "samples.npz", "--metrics", "fid", *small)
    assert "unknown origin" not in printed and "stats.npz: 6 images are too few" in printed
    assert "differ in size (height, width): [(16, 16), (24, 24)]" in printed
    np.savez(tmp_path / "other.npz",
             **{name.replace("test_resnet ", "test_resnet 0"): a for name, a in stats.items()})
    np.savez(tmp_path / "two.npz", arr_0=noise(2), **stats)            # two images: only the statistics count
    out = command("fid", "two.npz", "ref", *small)
    assert "fd_test_resnet " in out and "kid" not in out and "recall" not in out
    for words, flags in (("other.npz: 0 image(s), statistics of test_resnet 0|of test_resnet ",
                          ["other.npz", "ref"]),
                         ("--metrics kid", ["two.npz", "ref", "--metrics", "kid"]),
                         ("--save-stats: |and 2 images", ["two.npz", "--save-stats", "x.npz"])):
        one_line(command("fid", *flags, *small, code=2), *words.split("|"))
