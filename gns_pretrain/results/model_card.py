"""The model card of an export: README.md as the hub shows it, from the run's own record."""

import math
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from gns_pretrain.data.settings import EMBEDDED
from gns_pretrain.data.shards import META_FILE, read_meta
from gns_pretrain.model.config import LlamaConfig, count_parameters
from gns_pretrain.model.huggingface import ExportedText
from gns_pretrain.runs.directory import METRICS, read_settings
from gns_pretrain.runs.history import read_provenance
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training.trained_model import TrainedModel

CURVE_ROWS = 12  # at most, of the validation curve; the first and the last are among them
# Settings that decide what is trained; the others name folders, projects and machines.
SHOWN = (
    *("seed", "token_budget", "micro_batch_size", "gradient_clip", "precision", "model"),
    *("optimizer", "schedule", "batch_size", "noise_scale", "bad_steps"),
)
SHOWN_OF_DATA = ("sequence_length", "document_mask")
CARD = """\
---
{head}---

# {title}

A Llama model of {parameters:,} parameters, pretrained with gns-pretrain on {tokens:,} tokens of
{data}. It continues text, in a context of {positions:,} tokens; it follows no instructions.
{origin}{licence}
```python
from transformers import pipeline

generate = pipeline("text-generation", model="{place}")
print(generate("Once", max_new_tokens=50)[0]["generated_text"])
```

## Results

| | |
|---|---|
{results}

Losses are in nats a token.

{curve}## Settings

```yaml
{settings}```
"""


def model_card(
    trained: TrainedModel,
    model: LlamaConfig,
    text: ExportedText,
    *,
    place: str,
    license_name: str | None,
) -> str:
    """Describe a checkpoint of a run, without a path or a name of its machine.

    Args:
        trained: a checkpoint whose run is known.
        model: its shape.
        text: what is exported with it.
        place: repository or folder that it is loaded from.
        license_name: as the hub names it (apache-2.0); None claims nothing.
    """
    assert trained.run is not None
    settings, provenance = read_settings(trained.run), read_provenance(trained.run)
    position = trained.position
    assert position is not None
    datasets, data = described_data(trained)
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "gns-pretrain"],
        **({"license": license_name} if license_name else {}),
        **({"datasets": datasets} if datasets else {}),
    }
    shown = {name: settings[name] for name in SHOWN if name in settings}
    shown["data"] = {name: settings["data"].get(name) for name in SHOWN_OF_DATA}
    began = provenance.get("init")
    lines = [line for line in read_records(trained.run / METRICS) if line["step"] <= position.step]
    evaluations = [line for line in lines if line["kind"] == "validation"]
    results = {"optimizer steps": f"{position.step:,}", "tokens": f"{position.tokens:,}"}
    if evaluations:
        loss = evaluations[-1]["loss"]
        results["validation loss"] = f"{loss:.4f}, perplexity {math.exp(min(loss, 700.0)):,.2f}"
    if batches := [line for line in lines if line["kind"] == "train"]:
        results["training loss"] = f"{batches[-1]['loss']:.4f}, of the last batch"
        results["last batch"] = f"{batches[-1]['batch_size']:,} sequences"
    return CARD.format(
        head=yaml.safe_dump(head, sort_keys=False),
        title=settings.get("run_name") or trained.run.name,
        parameters=count_parameters(model).total,
        tokens=position.tokens,
        data=data,
        positions=text.max_positions,
        origin="" if began is None else f"It began from {Path(began['from']).name}.\n",
        licence="" if license_name else "No licence has been chosen for it.\n",
        place=place,
        results="\n".join(f"| {name} | {value} |" for name, value in results.items()),
        curve=curve_of(evaluations),
        settings=yaml.safe_dump(shown, sort_keys=False),
    )


def described_data(trained: TrainedModel) -> tuple[list[str], str]:
    """The datasets on the hub that a run was trained on, and what to call its text."""
    assert trained.data is not None
    datasets, names = [], []
    for part in trained.data.parts:
        is_only = len(trained.data.parts) == 1
        name = "docstrings of Python packages"
        if part.path != EMBEDDED:
            folder = trained.data_folder() if is_only else trained.data.folder_of(part)
            made = read_meta(folder).settings if (folder / META_FILE).is_file() else {}
            name = f"the token shards {folder.name}"
            if made.get("source") == "hub" and "/" in str(made.get("dataset")):
                datasets.append(str(made["dataset"]))
                words = (made[key] for key in ("dataset", "dataset_config") if made.get(key))
                name = " ".join(map(str, words))
        names.append(name if is_only else f"{name} (weight {part.weight:g})")
    return datasets, ", ".join(names)


def curve_of(evaluations: list[dict[str, Any]]) -> str:
    """Format the validation curve as a table, every so many rows of a long one."""
    last = len(evaluations) - 1
    rows = min(len(evaluations), CURVE_ROWS)
    chosen = sorted({round(index * last / max(rows - 1, 1)) for index in range(rows)})
    if not chosen:
        return ""
    body = "".join(
        f"| {line['tokens']:,} | {line['step']:,} | {line['loss']:.4f} |\n"
        for line in (evaluations[index] for index in chosen)
    )
    return f"| tokens | step | validation loss |\n|---:|---:|---:|\n{body}\n"
