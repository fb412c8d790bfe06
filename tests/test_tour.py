"""The tour's script, experiments/tour.sh, run for real at toy size."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs, noise_pictures, slow
from PIL import Image

from vae import load_vae

RUNS = "naive repae nonorm noalign repa".split()
DIFFERENT = {"naive": dict(vae_grad="diffusion"), "nonorm": dict(latent_norm=False), "repa": dict(vae_grad="none"),
             "noalign": dict(vae_align_proj_coeff=0.0), "repae": {}}


@needs("matplotlib")
@pytest.mark.skipif(os.name != "posix", reason="a bash script")
@slow
def test_tour_sh_at_toy_size(tmp_path):
    """Each run is its regime and starts from base's VAE; what is done is not done twice; other settings are refused."""
    for folder in ("train/one", "train/two", "val/one"):
        noise_pictures(tmp_path / "data" / folder, 6, size=32)
    out = tmp_path / "out"
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
           "OUT": str(out), "DATA": str(tmp_path / "data"), "BASE_STEPS": "1", "STEPS": "2", "LOG_STEPS": "1",
           "FLAGS": "--batch-size 4 --projector-dim 32 --cfg-scale 1 --lr-warmup-steps 1 --disc-weight 0"}

    def start(code=0, **settings):
        done = subprocess.run(["bash", "experiments/tour.sh"], cwd=ROOT, env=env | settings, capture_output=True,
                              text=True)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout, done.stderr

    def trained(printed):
        return [line.split(":")[0].removeprefix("== ") for line in printed.splitlines() if line.startswith("== ")]

    printed, _ = start()
    assert trained(printed) == ["base", *RUNS]
    base = out / "base/checkpoints/0000001.pt"
    start_from, settings = load_vae(base)[0].state_dict(), {}
    for run in RUNS:
        settings[run] = json.loads((out / run / "args.json").read_text())
        expected = settings["naive"] | dict(exp_name=run, vae_ckpt=str(base), vae_grad="repa", max_train_steps=2)
        assert settings[run] == expected | DIFFERENT[run], run                       # equal in all else
        moved = [not torch.equal(t, start_from[name])
                 for name, t in load_vae(out / run / "checkpoints/0000002.pt")[0].state_dict().items()]
        assert not any(moved) if run == "repa" else all(moved), run
        assert (out / run / "pictures/samples-0000002.png").is_file()
    table = (out / "table.md").read_text()
    for run in RUNS:
        rows = [json.loads(line) for line in (out / run / "metrics.jsonl").read_text().splitlines()]
        assert f"{run}:\n" in table and f"| {rows[-1]['proj_loss']:.4g} |" in table
    assert table.count("effective dimensions") == 5 and table in printed              # base's VAE is repa's
    assert Image.open(out / "latents.png").width > 600 and Image.open(out / "curves.png").width > 600

    (out / "noalign/checkpoints/0000002.pt").unlink()
    assert trained(start(RUNS="naive noalign")[0]) == ["noalign"]
    for code, wrong, words in ((2, dict(STEPS="4"), "was begun with"), (2, dict(RUNS="repea"), "repea: no run")):
        error = start(code, **wrong)[1]
        assert len(error.splitlines()) == 1 and error.startswith("error") and words in error
