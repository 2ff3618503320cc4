"""The smallest run that still has every part: uneven widths, grouped queries, two kinds of text."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.config.schema import Config, LaunchSettings
from gns_pretrain.data.settings import DataSettings
from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.tracking.settings import MetricsSettings
from gns_pretrain.tracking.unit import TOKENS
from gns_pretrain.training.checkpoint import CheckpointSettings
from gns_pretrain.training.evaluate import EvaluationSettings

VOCABULARY = 61
SEQUENCE_LENGTH = 16


def odd_model(**changes: Any) -> LlamaConfig:
    """A Llama whose widths neither 2 nor 4 ranks divide: 18, 26 and 61."""
    values: dict[str, Any] = {
        "name": "odd",
        "dim": 18,
        "num_layers": 2,
        "num_heads": 3,
        "num_kv_heads": 1,
        "ffn_dim": 26,
        "vocab_size": VOCABULARY,
    }
    return LlamaConfig(**(values | changes))


def small_run(folder: Path, data: Path, *, steps: int = 20, **changes: Any) -> Config:
    """Settings of a run of `steps` steps of 8 sequences, which takes a second on one core."""
    values: dict[str, Any] = {
        "run_name": "small",
        "output_directory": str(folder),
        "token_budget": steps * 8 * SEQUENCE_LENGTH,
        "micro_batch_size": 2,
        "model": odd_model(),
        "data": DataSettings(path=str(data), sequence_length=SEQUENCE_LENGTH),
        "optimizer": AdamWSettings(lr=1e-2),
        "batch_size": BatchSizeSettings(initial=8),
        "evaluation": EvaluationSettings(every_tokens=10 * 8 * SEQUENCE_LENGTH, num_sequences=7),
        "checkpoint": CheckpointSettings(every_steps=5, keep=2),
        "metrics": MetricsSettings(log_every=3, progress="never"),
        "launch": LaunchSettings(device="cpu", threads=1),
    }
    return Config(**(values | changes))


def planned(config: Config) -> Any:
    """What the schedule and the batch size ask of a workload on text, without its data."""
    assert isinstance(config.data, DataSettings)
    total_samples = -(-config.token_budget // config.data.sequence_length)
    return SimpleNamespace(
        unit=replace(TOKENS, per_sample=config.data.sequence_length),
        total_samples=total_samples,
        steps_at=lambda batch_size: -(-total_samples // batch_size),
    )


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl less what the clock and the memory of a GPU put into it."""
    timed = ("step_seconds", "tokens_per_second", "samples_per_second")
    timed += ("seconds", "mfu", "peak_memory_gib")
    return {key: value for key, value in record.items() if key not in timed}


def threads(count: int = 1) -> None:
    """Fix the threads: the order of a sum, and so its last bits, depends on them."""
    torch.set_num_threads(count)
