"""experiments/evaluate.py compared with fid.py and sample.py as commands."""
import json

import numpy as np
import pytest
import torch

from conftest import save_checkpoint, slow
from data.images import list_images, read_image
from experiments import evaluate
from fid import frechet_distance
from repa import create_encoder
from sample import load_checkpoint
from support.commands import UserError
from support.grids import to_float, to_uint8


@slow
def test_fds_of_a_run_equal_those_of_fid_py(image_dir, call, command, tmp_path):
    """For the same samples and reconstructions; steps that are done are not evaluated again."""
    a = tmp_path / "exps/a"
    ckpt = save_checkpoint(a / "checkpoints/0000004.pt", num_classes=2, data_dir=str(image_dir))
    torch.save(create_encoder("resnet18", random=True)[0].state_dict(), tmp_path / "net.pth")
    network = ["--features", "resnet18", "--features-weights", tmp_path / "net.pth"]
    flags = [a, "--samples", 20, "--num-steps", 2, *network, "--points"]
    call(evaluate.main, *flags, 4)
    record = json.loads((a / "fd.json").read_text())

    def fid(*flags, name="fd_resnet18"):
        command("fid", *flags, *network, "--num-workers", 0, "--device", "cpu", "--json", "out.json")
        return pytest.approx(json.loads((tmp_path / "out.json").read_text())[name], rel=1e-4)

    sampled = ["--ckpt", ckpt, "--num-samples", 20, "--num-steps", 2, "--mixed-precision", "auto"]
    assert record["fd"]["4"] == fid(image_dir, *sampled, "--metrics", "fid")
    assert record["psnr"] == fid(image_dir, "--ckpt", ckpt, "--reconstruct", name="psnr")
    assert record["rfd"] == fid(image_dir, "--ckpt", ckpt, "--reconstruct", name="rfd_resnet18")
    command("sample", *sampled, "--out", "samples.npz", "--device", "cpu")
    model = load_checkpoint(ckpt)
    x = torch.stack([read_image(file, 32) for file in list_images(image_dir)])
    with torch.no_grad():
        made = to_uint8(model.vae.decode(model.vae.encode(to_float(x)).mean))
    np.savez(tmp_path / "made.npz", arr_0=made.permute(0, 2, 3, 1).numpy())
    assert record["fd_to_reconstructions"] == fid(tmp_path / "made.npz", tmp_path / "samples.npz",
                                                  "--metrics", "fid")

    (tmp_path / "data").mkdir()
    for part, name in (("train", "one"), ("val", "two words")):
        (tmp_path / "data" / part).symlink_to(image_dir / name)
    floor = fid(tmp_path / "data/train", tmp_path / "data/val", "--metrics", "fid").expected
    assert f"12 held-out images to the 12 training images: {floor:.1f}\n" in call(
        evaluate.main, "--floor", tmp_path / "data", "--samples", 4, *network)

    (a / "fd.json").write_text(json.dumps(record | dict(fd={"4": 7.0})))               # not done again
    assert call(evaluate.main, *flags, 4).endswith(f"{a}: 4: 7.0\n")
    with pytest.raises(UserError, match="other settings"):
        call(evaluate.main, *flags, 4, "--samples", 21)


def test_fd_of_features_equals_its_formula():
    a, b = np.random.default_rng(0).random((20, 3)), np.random.default_rng(1).random((30, 3)) ** 2
    pair = [(torch.tensor(f.mean(0)), torch.tensor(np.cov(f.T))) for f in (a, b)]
    found = evaluate.fd_of_features(*map(torch.tensor, (a, b)))
    assert found == pytest.approx(frechet_distance(*pair), rel=1e-6)
