"""metrics.py: a run's metrics.jsonl, other loggers, and the alarm for bad steps."""
import json
import math
import os
from importlib.util import find_spec

from tqdm import tqdm

from support.commands import UserError, one_line, require
from support.files import write_atomic


def check_logger(report_to):
    """Raises UserError if --report-to cannot work: its package is missing, or wandb has no key."""
    require(not report_to or find_spec(report_to), f"--report-to: pip install {report_to}")
    if report_to == "wandb" and os.environ.get("RANK", "0") == "0":                 # the process that logs
        import wandb
        try:
            wandb.login()                                         # needs nothing with WANDB_MODE=offline
        except wandb.errors.Error as e:
            raise UserError(f"--report-to wandb: {one_line(e)} (wandb login, WANDB_API_KEY=..., or "
                            "WANDB_MODE=offline)") from None


def read_rows(file):
    """The rows of a .jsonl file, dicts; [] without a file. A line cut off by a kill is left out."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def start_metrics(folder, step, report_to, name, settings):
    """Cut metrics.jsonl in `folder` back to `step`, and open it for appending. Returns log(step, row), which
    writes and prints a row, a dict of numbers (null in the file if not finite); report_to: "tensorboard",
    "wandb" or "", where it also goes."""
    path = folder / "metrics.jsonl"
    kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step]
    write_atomic(path, lambda tmp: tmp.write_text("".join(kept)))
    file = open(path, "a", buffering=1)                              # noqa: SIM115 (open until the end)
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder, purge_step=step + 1)             # hides steps after the checkpoint
    elif report_to == "wandb":
        import wandb
        wandb.init(project="repa-e", name=name, config=settings, dir=folder)

    def log(step, row):
        numbers = {key: value if math.isfinite(value) else None for key, value in row.items()}
        file.write(json.dumps(dict(step=step) | numbers) + "\n")
        if report_to == "tensorboard":
            for key, value in row.items():
                writer.add_scalar(key, value, step)
            writer.flush()                                              # it does not flush at exit
        elif report_to == "wandb":
            wandb.log(row, step=step)
        tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    return log


class BadSteps:
    """Detects that many consecutive steps were bad, from the cumulative counts in the rows of the log."""
    LIMITS = dict(skipped=(20, "gradients not finite"), zero_gradients=(100, "gradients exactly zero"))

    def __init__(self, step):
        self.last = dict.fromkeys(self.LIMITS, 0) | dict(step=step)
        self.consecutive = dict.fromkeys(self.LIMITS, 0)

    def update(self, step, row):
        """"", or the problem once its limit of consecutive bad steps is reached. Steps between two rows count
        only if all of them were bad."""
        steps, problem = step - self.last["step"], ""
        for name, (limit, words) in self.LIMITS.items():
            all_bad = row[name] - self.last[name] == steps
            self.consecutive[name] = self.consecutive[name] + steps if all_bad else 0
            if self.consecutive[name] >= limit:
                problem = f"{words} for {self.consecutive[name]} consecutive steps"
        self.last = row | dict(step=step)
        return problem
