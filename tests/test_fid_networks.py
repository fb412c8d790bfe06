"""fid.py over several networks: one pass, statistics in one file, MIND, the ratio to held-out images,
LPIPS."""
import json
import sys

import numpy as np
import pytest
import timm
import torch

import fid
import repa
import vae
from conftest import CPU, ROOT, one_line, run, slow, smooth_images, torchrun
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


def test_statistics_of_an_older_version_are_read(images, numbers, command, weights):
    """mu, sigma, features and the hash, of one network."""
    network = ["--features", "test_resnet", "--features-weights", weights[0]]
    expected = numbers("train.npz", "samples.npz", "--metrics", "fid", *network)
    (net,) = fid.load_networks("test_resnet", CPU, weights=weights[0])
    mu, sigma = fid.collect(fid.ImageSet(images / "train.npz"), [(net, "pool")], CPU, 64)[net.id, "pool"]
    for file, sha256 in (("older.npz", net.sha256), ("other.npz", "0" * 64)):
        np.savez(images / file, mu=mu, sigma=sigma, features="test_resnet", sha256=sha256, n=12,
                 shape=(32, 32))
    assert numbers("older.npz", "samples.npz", *network)["fd_test_resnet"] == expected["fd_test_resnet"]
    one_line(command("fid", "other.npz", "samples.npz", *network, *FLAGS, code=2),
             "test_resnet 00000000 (96 features)")


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


def test_mind_of_identical_sets_is_zero_and_mind_is_symmetric():
    x, y = gaussians(500), gaussians(500, seed=1) + 0.5
    assert fid.mind(x, x) == 0 and fid.mind(x, x.flip(0)) == 0
    assert fid.mind(x, y) == fid.mind(y, x) > 0


@pytest.mark.parametrize("mean", [1, 3])
def test_mind_of_two_gaussians(mean):
    """3 d mean^2: the squared distance of the means along a random direction is d mean^2 / d on average."""
    x, y = gaussians(2000), gaussians(2000, seed=1) + mean
    assert fid.mind(x, y, directions=500) == pytest.approx(3 * 64 * mean ** 2, rel=0.1)


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

@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])
def test_evaluation_in_a_program(short_run, image_dir, processes, tmp_path):
    """As training calls it: the network and the reference are kept, several samplers are compared with it;
    what fid.py prints, for any number of processes."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import json
import sys
from pathlib import Path
import fid
from sample import load_checkpoint
from support.devices import pick_device, start_processes
device = pick_device("cpu")
processes = start_processes(device)
settings = dict(device=device, batch_size=4, processes=processes)
nets = fid.load_networks({repa.LITE2!r}, device)
for start in range(2):
    ref = fid.ImageSet({str(image_dir)!r}, 32) if start == 0 else fid.ImageSet("stats.npz")
    fid.check_source(ref, nets)
    reference = fid.collect(ref, [(net, "pool") for net in nets], **settings)
    if processes.rank == 0:
        fid.save_stats("stats.npz", ref, reference)
    processes.wait()
    for step in (2, 4):
        sampler = load_checkpoint(f"exps/a/checkpoints/000000{{step}}.pt")
        samples = fid.Samples(Path("samples"), sampler, 14, dict(num_steps=2))
        values = fid.evaluate(reference, samples, [(net, "fid") for net in nets], **settings)
        if processes.rank == 0:
            Path(f"values-{{start}}-{{step}}.json").write_text(json.dumps(values))
        else:
            assert values == {{}}
""")
    launch = torchrun(processes) if processes > 1 else [sys.executable]
    run(*launch, program, cwd=short_run)
    run(sys.executable, ROOT / "fid.py", image_dir, "--ckpt", "exps/a/checkpoints/0000004.pt",
        "--num-samples", "14",
        "--num-steps", "2", "--features", repa.LITE2, "--metrics", "fid", "--json", "out.json", *FLAGS,
        cwd=short_run)
    key = f"fd_{repa.LITE2}"
    printed = json.loads((short_run / "out.json").read_text())
    for start in range(2):
        values = json.loads((short_run / f"values-{start}-4.json").read_text())
        assert set(values) == {key} and values[key] == pytest.approx(printed[key], rel=1e-4)
    assert json.loads((short_run / "values-0-2.json").read_text())[key] > 0


def test_lpips_of_reconstructions(short_run, image_dir, numbers, command):
    """With the weights that the run was trained with; without them a line says so."""
    torch.manual_seed(0)
    lpips = vae.LPIPS(random=True)
    torch.save({f"features.{name}": tensor for name, tensor in lpips.vgg.state_dict().items()},
               short_run / "vgg.pth")
    heads = {f"lin{i}.model.1.weight": head for i, head in lpips.heads.state_dict().items()}
    torch.save(heads, short_run / "heads.pth")
    saved = load_tensors(short_run / "exps/a/checkpoints/0000004.pt")
    files = dict(perceptual="lpips", lpips_ckpt=str(short_run / "heads.pth"),
                 vgg_ckpt=str(short_run / "vgg.pth"))
    flags = [image_dir, "--ckpt", "lpips.pt", "--reconstruct", "--features", repa.LITE2, "--batch-size", "5"]
    torch.save(dict(saved, args=saved["args"] | files), short_run / "lpips.pt")
    found = numbers(*flags, cwd=short_run)
    images = torch.stack([read_image(file, 32) for file in list_images(image_dir)])
    x = to_float(images)
    y = to_float(to_uint8(vae.reconstruct(load_checkpoint(short_run / "lpips.pt").vae, images)[1]))
    expected = np.mean([lpips(a[None], b[None]).item() for a, b in zip(x, y, strict=True)])
    assert found["lpips"] == pytest.approx(expected, rel=1e-3) and found["lpips"] > 0
    (short_run / "vgg.pth").unlink()
    out = command("fid", *flags, *FLAGS, cwd=short_run)
    assert "no " in out and "vgg.pth" in out and "psnr" in out and "\n  lpips" not in out
