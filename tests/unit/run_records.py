"""Run records made by hand, for what reads them."""

import csv
import json

import yaml


def nested(settings):
    """{"batch_size.theta": 0.6} as config.yaml nests it."""
    tree = {}
    for key, value in settings.items():
        *groups, name = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return tree


def configuration(table, cell, *, seed=0, scale="demo", **settings):
    """Settings of a run; keyword arguments nest with two underscores."""
    constant = cell.endswith(("_small", "_large", "_baseline")) or cell.startswith("constant")
    values = {
        "run_name": f"{table}-{cell}-{scale}-seed{seed}",
        "table": table,
        "cell": cell,
        "seed": seed,
        "token_budget": 1000,
        "scale.name": scale,
        "model.dim": 8,
        "optimizer.name": cell.split("_")[0],
        "optimizer.lr": 0.001,
        "batch_size.policy": "constant" if constant and table != "table9" else "adaptive",
        "batch_size.initial": 64 if "large" in cell else 16,
        "batch_size.theta": 0.6,
        "batch_size.geometry": "manhattan",
        "batch_size.estimate": "plug_in",
    }
    return nested(values | {key.replace("__", "."): value for key, value in settings.items()})


def write_run(outputs, table, cell, evaluations, *, steps=None, finished=True, name=None, **more):
    """A run directory with evaluations [(step, loss), ...]; `more` as for configuration."""
    config = configuration(table, cell, **more)
    directory = outputs / (name or config["run_name"])
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"kind": "validation", "step": step, "tokens": 10 * step, "loss": loss}
        for step, loss in evaluations
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = {"state": "finished", "steps": steps or evaluations[-1][0]}
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def write_curve(path, rows, **columns):
    """A published curve: rows of (step, validation loss), and further columns by short name."""
    names = {
        "tokens": "n_tokens_seen",
        "batch_size": "batch_size/global_batch_size",
        "noise": "adaptive_batch_metrics/gns_ema",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["_step", "validation_metrics/loss", *(names[key] for key in columns)])
        writer.writerows(
            [*row, *more]
            for row, more in zip(rows, zip(*columns.values(), strict=True), strict=True)
        ) if columns else writer.writerows(rows)
    return path
