"""fid.py over several networks: one pass, statistics in one file, MIND, the ratio to held-out images,
LPIPS."""
import json

import numpy as np
import pytest
import timm
import torch

import fid
import repa
import vae
from conftest import one_line, smooth_images
from data.images import list_images, read_image
from sample import load_checkpoint
from support.files import load_tensors
from support.grids import to_float, to_uint8

FLAGS = ("--device", "cpu", "--num-workers", "0")


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Files of random weights of two small networks, test_resnet and test_vit."""
    folder, files = tmp_path_factory.mktemp("networks"), []
    for seed, name in enumerate(("test_resnet", "test_vit")):
        torch.manual_seed(seed)
        files.append(str(folder / f"{name}.pth"))
        torch.save(timm.create_model(name).state_dict(), files[-1])
    return files


@pytest.fixture
def images(tmp_path):
    """train.npz, val.npz and samples.npz in tmp_path: 12, 8 and 8 images."""
    for seed, (name, n) in enumerate((("train", 12), ("val", 8), ("samples", 8))):
        np.savez(tmp_path / f"{name}.npz",
                 arr_0=smooth_images(n, 32, seed, blur=6 if name == "samples" else 4))
    return tmp_path


@pytest.fixture
def numbers(command, tmp_path):
    """numbers(*flags): what fid.py writes to --json."""
    def call(*flags, cwd=tmp_path):
        command("fid", *flags, "--json", "out.json", *FLAGS, cwd=cwd)
        return json.loads((cwd / "out.json").read_text())
    return call


def test_several_networks_give_what_each_gives_alone(images, numbers, weights, monkeypatch):
    """In one pass over the images; the weights go to the timm models in their order."""
    read, batches = [], fid.ImageSet.batches

    def counted(self, *args):
        read.append(self.path.name)
        return batches(self, *args)

    alone = {}
    for name, file in (("test_resnet", weights[0]), ("test_vit", weights[1]), (repa.LITE2, "")):
        alone |= numbers("train.npz", "samples.npz", "--features", name, "--features-weights", file)
    monkeypatch.setattr(fid.ImageSet, "batches", counted)
    names = f"test_resnet,{repa.LITE2},test_vit"
    together = numbers("train.npz", "samples.npz", "--features", names, "--features-weights",
                       ",".join(weights))
    assert together["features"] == names and sorted(read) == ["samples.npz", "train.npz"]
    measured = [key for key in alone if key.startswith(("fd_", "kid_", "mind_", "precision_", "recall_"))]
    assert len(measured) == 15
    for key in measured:
        assert together[key] == pytest.approx(alone[key], rel=1e-6)


def test_statistics_of_several_networks_in_one_file(images, numbers, command, weights):
    """They stand for the images; each network takes its own."""
    networks = ["--features", "test_resnet,test_vit", "--features-weights", ",".join(weights)]
    command("fid", "train.npz", "--save-stats", "stats.npz", *networks, *FLAGS)
    expected = numbers("train.npz", "samples.npz", "--metrics", "fid", *networks)
    stored = numbers("stats.npz", "samples.npz", *networks)
    assert stored["fd_test_vit"] == expected["fd_test_vit"] and "kid_test_vit" not in stored
    assert stored["fd_test_resnet"] == expected["fd_test_resnet"] and stored["n_reference"] == 12
    swapped = ["--features", "test_vit", "--features-weights", weights[1]]
    assert numbers("stats.npz", "samples.npz",
                   *swapped)["fd_test_vit"] == pytest.approx(expected["fd_test_vit"])
    out = command("fid", "stats.npz", "samples.npz", "--features", repa.LITE2, *FLAGS, code=2)
    one_line(out, "stats.npz: 0 image(s), statistics of test_", f"or statistics of {repa.LITE2} ")


def test_ratio_to_held_out_images(images, numbers, command, weights):
    """FDr: FD(samples, train) / FD(val, train) of each network, and their mean; of val itself 1."""
    networks = ["--features", "test_resnet,test_vit", "--features-weights", ",".join(weights), "--metrics",
                "fid"]
    sampled, val = (numbers("train.npz", f"{name}.npz", *networks) for name in ("samples", "val"))
    found = numbers("train.npz", "samples.npz", "--ratio", "val.npz", *networks)
    ratios = [sampled[key] / val[key] for key in ("fd_test_resnet", "fd_test_vit")]
    assert [found["fd_test_resnet_ratio"], found["fd_test_vit_ratio"]] == pytest.approx(ratios)
    assert found["fdr^2"] == pytest.approx(sum(ratios) / 2) and found["n_samples"] == 8
    of_val = numbers("train.npz", "val.npz", "--ratio", "val.npz", *networks)
    assert of_val["fdr^2"] == 1 and of_val["fd_test_resnet_ratio"] == 1
    for flags in (["samples.npz", "--metrics", "kid"], ["--save-stats", "x.npz"]):
        command("fid", "train.npz", *flags, "--ratio", "val.npz", *FLAGS, code=2)
    same = command("fid", "train.npz", "samples.npz", "--ratio", "train.npz", *networks, *FLAGS, code=2)
    one_line(same, "--ratio", "train.npz")


# --- MIND ---------------------------------------------------------------------------------------------------

def gaussians(n, d=64, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_mind_by_its_formula():
    """With the generator's order of torch-fidelity: a subset of the larger set, then the directions."""
    x, y = gaussians(40, 5).double(), (gaussians(60, 5, seed=1) * 2).double()
    g = torch.Generator().manual_seed(2020)
    y_chosen = y[torch.randperm(60, generator=g)[:40]].numpy()
    u = torch.randn(30, 5, generator=g).double().numpy()
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    squares = [np.mean((np.sort(x.numpy() @ v) - np.sort(y_chosen @ v)) ** 2) for v in u]
    assert fid.mind(x, y, directions=30) == pytest.approx(15 * np.mean(squares), rel=1e-6)


# --- Checkpoints --------------------------------------------------------------------------------------------

def test_reconstructions_are_evaluated(short_run, image_dir, numbers, command):
    """Of a run against its own data; LPIPS with the weights that the run was trained with, without them a line
    says so."""
    torch.manual_seed(0)
    lpips = vae.LPIPS(random=True)
    torch.save({f"features.{name}": tensor for name, tensor in lpips.vgg.state_dict().items()},
               short_run / "vgg.pth")
    heads = {f"lin{i}.model.1.weight": head for i, head in lpips.heads.state_dict().items()}
    torch.save(heads, short_run / "heads.pth")
    saved = load_tensors(short_run / "exps/a/checkpoints/0000004.pt")
    files = dict(perceptual="lpips", lpips_ckpt=str(short_run / "heads.pth"),
                 vgg_ckpt=str(short_run / "vgg.pth"))
    flags = ["--ckpt", "lpips.pt", "--reconstruct", "--features", repa.LITE2, "--batch-size", "5"]
    torch.save(dict(saved, args=saved["args"] | files), short_run / "lpips.pt")
    found = numbers(*flags, cwd=short_run)
    images = torch.stack([read_image(file, 32) for file in list_images(image_dir)])
    made = to_uint8(vae.reconstruct(load_checkpoint(short_run / "lpips.pt").vae, images)[1])
    net, x, y = fid.PooledFeatures(repa.LITE2), to_float(images), to_float(made)
    with torch.no_grad():
        features = [net(pixels)["pool"].double() for pixels in (images, made)]
    expected = {f"rfd_{repa.LITE2}": fid.frechet_distance(*[(f.mean(0), torch.cov(f.T)) for f in features]),
                "psnr": vae.psnr(x, y).mean().item(), "ssim": vae.ssim(x, y).mean().item(),
                "lpips": np.mean([lpips(a[None], b[None]).item() for a, b in zip(x, y, strict=True)]),
                "n_reference": 24, "n_samples": 24}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    (short_run / "vgg.pth").unlink()
    out = command("fid", *flags, *FLAGS, cwd=short_run)
    assert "no " in out and "vgg.pth" in out and "psnr" in out and "\n  lpips" not in out
