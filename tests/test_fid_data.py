"""What people hand to fid.py: their folders, their statistics, few samples. No wrong number, and one line where
something is not what it seems."""
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import fid
from support.commands import UserError

CPU = torch.device("cpu")
INCEPTION = SimpleNamespace(name="inception", sha256="a" * 64, channels=2048, size=299)     # stands for the network


def pictures(n, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def folder_of(path, images, suffix=".png"):
    path.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03d}{suffix}")
    return path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(timm.create_model("resnet18").state_dict(), file)
    return ["--features", "resnet18", "--features-weights", str(file), "--device", "cpu", "--num-workers", "0"]


def run(monkeypatch, capsys, *flags):
    """fid.py with these flags: what it prints."""
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, flags)])
    fid.main()
    return capsys.readouterr().out


# --- Labels -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, expected", [(4, [0, 2, 5, 7]), (3, [0, 3, 6]), (12, [*range(10), 0, 1])])
def test_few_samples_are_spread_over_the_classes(monkeypatch, n, expected):
    """Whatever the batches and processes; from as many samples as classes on, image i has label i mod classes."""
    model = SimpleNamespace(args=dict(resolution=8), sit=SimpleNamespace(num_classes=10))
    drawn = {}
    monkeypatch.setattr(fid, "sample_images", lambda model, indices, labels, **kw: drawn.update(zip(indices, labels)))
    for mine in (range(n // 2), range(n // 2, n)):
        list(fid.Samples(Path("x.pt"), model, n, {}).batches(mine, 2))
    assert [drawn[i] for i in range(n)] == expected


# --- Folders ----------------------------------------------------------------------------------------------------

def test_every_image_is_read_and_other_files_are_counted(tmp_path, monkeypatch, capsys, resnet):
    ref, samples = folder_of(tmp_path / "ref", pictures(6, seed=1)), folder_of(tmp_path / "samples", pictures(3))
    folder_of(samples, pictures(2, seed=2), ".ppm")
    folder_of(samples, pictures(1, seed=3), ".jfif")
    (samples / "labels.txt").write_text("0")
    np.savez(samples / "more.npz", arr_0=pictures(3))
    out = run(monkeypatch, capsys, ref, samples, "--metrics", "fid", *resnet)
    assert "samples: 6 images" in out and "'.txt': 1" in out and "'.npz': 1" in out
    assert f"{ref}: 6 images; not read" not in out and "samples (6) against" in out


def test_a_jpeg_is_cropped_exactly_as_adm_does(tmp_path):
    """Box-halved while at least twice the size, then bicubic; not the JPEG decoder's own shrinking."""
    smooth = Image.fromarray(pictures(1, 8)[0]).resize((300, 260), Image.BICUBIC)
    for i in range(4):
        smooth.save(tmp_path / f"{i}.jpg", quality=95)
    image = Image.open(tmp_path / "0.jpg")
    for size in ((150, 130), (75, 65), (37, 32)):
        image = image.resize(size, Image.BOX)
    image = image.crop((2, 0, 34, 32))
    read, = fid.ImageSet(tmp_path, 32).batches(range(1), 1)
    assert np.array_equal(read[0].permute(1, 2, 0), image)


def test_the_same_files_on_both_sides_are_told(tmp_path, monkeypatch, capsys, resnet):
    ref = folder_of(tmp_path / "ref", pictures(5))
    folder_of(ref / "drawn", pictures(5, seed=1))
    (tmp_path / "link").symlink_to(ref)
    other = folder_of(tmp_path / "ref2", pictures(5))
    for samples, told in ((ref, True), (ref / "drawn", True), (tmp_path / "link", True), (other, False)):
        out = run(monkeypatch, capsys, ref, samples, "--metrics", "fid", *resnet)
        assert ("same, or one is part of the other" in out) == told, samples


def test_three_images_are_no_distribution(tmp_path, monkeypatch, capsys, resnet):
    ref, three = folder_of(tmp_path / "ref", pictures(4)), folder_of(tmp_path / "three", pictures(3))
    with pytest.raises(UserError, match="three: 3 image.*at least four"):
        run(monkeypatch, capsys, ref, three, *resnet)
    out = run(monkeypatch, capsys, ref, folder_of(tmp_path / "four", pictures(4)), *resnet)
    assert "fd_resnet18" in out and "precision                   1" in out and "4 images are too few" in out


def test_fewer_images_than_an_npz_announces(tmp_path):
    """A header that says 6 over the data of 5: an error, not a metric over 5."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("arr_0.npy", "w") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=(6, 16, 16, 3)))
        f.write(pictures(5).tobytes())
    source = fid.ImageSet(tmp_path / "a.npz")
    assert source.n == 6 and len(next(source.batches(range(0, 5), 5))) == 5
    for batch_size in (1, 2, 6):
        with pytest.raises(UserError, match="a.npz: damaged"):
            list(source.batches(range(6), batch_size))


# --- Statistics -------------------------------------------------------------------------------------------------

def test_statistics_beside_other_arrays_are_read(tmp_path):
    """mu, sigma first; features, counts and pickled objects beside them are left alone. Distance of two normal
    distributions with one covariance: the squared distance of their means."""
    cov, mean = np.diag(np.linspace(1, 2, 2048)), np.zeros(2048)
    np.savez(tmp_path / "a.npz", mu=mean, sigma=cov, features=np.zeros((24, 2048)), n=np.arange(3),
             names=np.array([{"pickled": 1}], dtype=object))
    a = fid.ImageSet(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", mu=mean + 0.5, sigma=cov)
    b = fid.ImageSet(tmp_path / "b.npz")
    lines = fid.check([a, b], INCEPTION)
    assert len(lines) == 2 and all("ADM's (TensorFlow's resize)" in x and "pytorch-fid" in x for x in lines)
    found = fid.evaluate([a, b], INCEPTION, ["fid"], device=CPU, batch_size=4)
    assert found["fid"] == pytest.approx(2048 * 0.25, rel=1e-6)


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
    np.savez(tmp_path / "both.npz", arr_0=pictures(4), **adm)                      # its images can be used
    both = fid.ImageSet(tmp_path / "both.npz")
    fid.check([both], resnet50)
    assert both.given == {} and both.n == 4


def test_saved_statistics_say_what_they_are(tmp_path, monkeypatch, capsys, resnet):
    images = pictures(6, seed=1)
    ref, samples = folder_of(tmp_path / "ref", images), folder_of(tmp_path / "s", pictures(6, 24))
    direct = run(monkeypatch, capsys, ref, samples, "--metrics", "fid", *resnet)
    run(monkeypatch, capsys, ref, "--save-stats", tmp_path / "stats.npz", *resnet)
    saved = run(monkeypatch, capsys, tmp_path / "stats.npz", samples, "--metrics", "fid", *resnet)
    number = [next(line for line in out.splitlines() if "fd_resnet18" in line) for out in (direct, saved)]
    assert number[0] == number[1] and "unmarked" not in saved
    assert "differ in size (height, width): [(16, 16), (24, 24)]" in saved
    assert "stats.npz: 6 images are too few" in saved
    stats = dict(np.load(tmp_path / "stats.npz"))
    np.savez(tmp_path / "older.npz", **stats | dict(sha256="0" * 64))
    with pytest.raises(UserError, match="older.npz: statistics of resnet18's 512 features .00000000., not of"):
        run(monkeypatch, capsys, tmp_path / "older.npz", samples, "--metrics", "fid", *resnet)
    np.savez(tmp_path / "foreign.npz", mu=stats["mu"], sigma=stats["sigma"])       # saved again: like ours
    with pytest.raises(UserError, match="--save-stats: .*foreign.npz holds statistics already"):
        run(monkeypatch, capsys, tmp_path / "foreign.npz", "--save-stats", tmp_path / "x.npz", *resnet)


@pytest.mark.parametrize("name", ["stats.pkl", "stats.npy", "samples.zip", "picture.png", "nameless"])
def test_a_file_of_another_type(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"{name}: a file of type .*; give a folder or an .npz"):
        fid.ImageSet(tmp_path / name)


def test_a_pickle_called_npz(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"\x80\x04}\x94.")
    with pytest.raises(UserError, match="a.npz: not a readable .npz"):
        fid.ImageSet(tmp_path / "a.npz")
