"""experiments/tour.sh, run for real at toy size, and its strips of samples."""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, metrics_of, needs, noise_images, one_line, run, slow
from experiments import strips
from support.commands import UserError
from vae import load_vae


@pytest.mark.skipif(os.name != "posix", reason="a bash script")
@needs("matplotlib")
@slow
def test_tour_sh_at_toy_size(tmp_path):
    """Each run starts from base's VAE, a student's own run included; finished runs are skipped."""
    for folder in ("train/one", "train/two", "val/one"):
        noise_images(tmp_path / "data" / folder, 6, size=32)
    out = tmp_path / "out"
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OUT": str(out), "BASE_STEPS": "1",
           "DATA": str(tmp_path / "data"), "STEPS": "2", "LOG_STEPS": "1", "MINE": "--projector conv",
           "FLAGS": "--batch-size 4 --projector-dim 32 --cfg-scale 1 --lr-warmup-steps 1 --disc-weight 0"}

    def start(runs, code=0, **settings):
        """Its output, and the runs that it trained."""
        printed = run("bash", ROOT / "experiments/tour.sh", cwd=tmp_path, code=code,
                      env=env | dict(RUNS=runs) | settings)
        return printed, [line.split(":")[0][3:] for line in printed.splitlines() if line.startswith("== ")]

    printed, trained = start("naive repa mine")
    assert trained == ["base", "naive", "repa", "mine"] and "== mine: --vae-ckpt" in printed
    base, table = load_vae(out / "base/checkpoints/0000001.pt")[0].state_dict(), (out / "table.md").read_text()
    for name in trained[1:]:
        changed = [not torch.equal(t, base[key])
                   for key, t in load_vae(out / name / "checkpoints/0000002.pt")[0].state_dict().items()]
        assert not any(changed) if name == "repa" else all(changed), name
        last = metrics_of(out / name)[-1]
        cells = " | ".join(f"{last[key]:.4g}"
                           for key in ("latent_variance", "proj_loss", "denoising_loss", "val_psnr"))
        assert f"{name}:\n" in table and f"| 2 | {cells} |" in table
    assert table.count("effective dimensions") == 3 and table in printed              # base's VAE is repa's
    assert all(Image.open(out / f"{name}.png").width > 600 for name in ("latents", "curves", "samples"))

    (out / "mine/checkpoints/0000002.pt").unlink()
    assert start("naive mine")[1] == ["mine"]
    for runs, settings, words in (("naive", dict(STEPS="4"), "has other settings"),
                                  ("repea", {}, "repea: unknown"),
                                  ("mine", dict(MINE="--qk-norm"), "has other settings")):
        one_line(start(runs, 2, **settings)[0], words)


@needs("matplotlib")
def test_strips_are_the_tops_of_the_last_grids(tmp_path, call):
    """In the order of the runs."""
    for name, top in (("first", "red"), ("second", "blue")):
        (tmp_path / name / "images").mkdir(parents=True)
        for step, colour in ((100, "yellow"), (300, top)):
            grid = Image.new("RGB", (40, 40), "lime")
            grid.paste(colour, (0, 0, 40, 10))
            grid.save(tmp_path / name / f"images/samples-{step:07d}.png")
    call(strips.main, tmp_path / "first", tmp_path / "second", "--out", tmp_path / "strips.png")
    column = np.asarray(Image.open(tmp_path / "strips.png").convert("RGB"))[:, 700].tolist()
    colours = [colour for colour, before in zip(column, [None, *column], strict=False) if colour != before]
    assert [c for c in colours if c != [255, 255, 255]] == [[255, 0, 0], [0, 0, 255]]
    with pytest.raises(UserError, match="no images/samples-"):
        strips.top_of_last_grid(tmp_path)
