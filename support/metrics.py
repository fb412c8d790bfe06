"""metrics.py: a run's metrics.jsonl, a line a row, and the loggers beside it."""
import json

from support.files import write_atomic


def start_metrics(folder, step, report_to, name, settings):
    """metrics.jsonl in `folder`, cut back to `step` and open for appending; report_to: 'tensorboard', 'wandb'
    or ''. Returns log(step, row), row a dict of numbers."""
    path, kept = folder / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.endswith("}") and json.loads(line)["step"] <= step:               # else cut off by a kill
            kept.append(line + "\n")
    write_atomic(path, lambda tmp: tmp.write_text("".join(kept)))
    file = open(path, "a", buffering=1)
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder)
    elif report_to == "wandb":
        import wandb
        wandb.init(project="repa-e", name=name, config=settings, dir=folder)

    def log(step, row):
        file.write(json.dumps(dict(step=step) | row) + "\n")
        if report_to == "tensorboard":
            for key, value in row.items():
                writer.add_scalar(key, value, step)
        elif report_to == "wandb":
            wandb.log(row, step=step)
    return log
