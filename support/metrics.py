"""metrics.py: a run's metrics.jsonl, a line a row, and the loggers beside it."""
import json
import math
import os
from importlib.util import find_spec

from support.commands import UserError, one_line
from support.files import write_atomic


def check_logger(report_to):
    """Raises UserError where --report-to would fail: its package is missing, or wandb has no key."""
    if report_to and not find_spec(report_to):
        raise UserError(f"--report-to: pip install {report_to}")
    if report_to == "wandb" and os.environ.get("RANK", "0") == "0":                   # the process that logs
        import wandb
        try:
            wandb.login()                                           # needs nothing with WANDB_MODE=offline
        except wandb.errors.Error as e:
            raise UserError(f"--report-to wandb: {one_line(e)} (wandb login, WANDB_API_KEY=..., or "
                            "WANDB_MODE=offline)") from None


def start_metrics(folder, step, report_to, name, settings):
    """metrics.jsonl in `folder`, cut back to `step` and open for appending; report_to: 'tensorboard', 'wandb'
    or ''. Returns log(step, row), row a dict of numbers, of which those that are not finite are written as
    null."""
    path, kept = folder / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.endswith("}") and json.loads(line)["step"] <= step:               # else cut off by a kill
            kept.append(line + "\n")
    write_atomic(path, lambda tmp: tmp.write_text("".join(kept)))
    file = open(path, "a", buffering=1)
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder, purge_step=step + 1)             # hides what a killed run logged later
    elif report_to == "wandb":
        import wandb
        wandb.init(project="repa-e", name=name, config=settings, dir=folder)

    def log(step, row):
        numbers = {key: value if math.isfinite(value) else None for key, value in row.items()}
        file.write(json.dumps(dict(step=step) | numbers) + "\n")
        if report_to == "tensorboard":
            for key, value in row.items():
                writer.add_scalar(key, value, step)
        elif report_to == "wandb":
            wandb.log(row, step=step)
    return log
