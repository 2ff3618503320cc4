import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cli import COMMANDS, CPU_PLAN, GPU_PLAN, QUICK_MODEL, main, parser
from benchmarks.harness import this_process
from benchmarks.memory import growth
from benchmarks.profile import Profile
from benchmarks.speed import Speed, statistics_bytes
from benchmarks.startup import Startup
from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.noise_scale.meter import NoiseMeter

# One block: four matrices 4 x 4 and three 6 x 4; 136 + 8 + 2 * 40 + 4 = 228 weights.
MODEL = LlamaConfig(
    name="test", dim=4, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=6, vocab_size=10
)
STEP = {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 4}


class SmallSpeed(Speed):
    def shape(self):
        return MODEL


class SmallProfile(Profile):
    def shape(self):
        return MODEL


def test_script_starts_in_any_folder_without_being_installed(tmp_path):
    script = Path(__file__).parents[3] / "scripts" / "benchmark.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(script), "plan", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "llama3_1b" in done.stdout


def test_every_part_runs_and_says_when_where_and_by_which_command(tmp_path, monkeypatch):
    # Worker processes would import torch first: the pool has tests of its own.
    monkeypatch.setattr("benchmarks.data.available_cores", lambda: 1)
    path = tmp_path / "figures.jsonl"
    assert main(["all", "--quick", "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    parts = [row["command"].split("benchmark.py ")[1].split()[0] for row in rows]
    assert set(parts) == set(COMMANDS) - {"all"}
    for row in rows:
        assert row["date"]
        assert row["machine"]["processor"]
        assert row["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("line", [*CPU_PLAN, *GPU_PLAN])
def test_plans_name_commands_and_arguments_that_exist(line):
    assert parser().parse_args(line.split()).command in COMMANDS.values()


def test_a_part_that_fails_leaves_the_others_their_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.cli.QUICK_PLAN",
        ("memory --steps 1", f"memory {QUICK_MODEL} --steps 12"),
    )
    path = tmp_path / "figures.jsonl"
    assert main(["all", "--quick", "--json", str(path)]) == 1
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert "--steps=1 must be at least 10" in first["failed"]
    assert second["steps"] == 12


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("speed --model demo --batch-size 2 --micro-batch-size 2", "is one micro-batch"),
        ("speed --model demo --batch-size 3 --micro-batch-size 2", "is not a multiple of"),
        ("noise_scale --samples 3 --ranks 2", "--samples=3 is not a multiple of --ranks=2"),
        ("model --model nobody", "--model=nobody is not known"),
        ("plan --gpus 12", "--gpus=12 are not whole nodes"),
        (
            "plan --gpus 1 8 --parallel fsdp single",
            "--parallel=single is one process, but --gpus=8",
        ),
        ("plan --sweep table2 --model tiny", "--model is each cell's own in --sweep=table2"),
        ("plan --sweep table2 --token-budget 9", "--token-budget is each cell's own"),
        ("plan --sweep table2 --gpus 8 16", "--gpus=[8, 16] with --sweep=table2; give one"),
        ("plan --sweep table2 --parallel fsdp hsdp", "with --sweep=table2; give one"),
        ("roofline --json /nowhere/at/all", "cannot be written"),  # an older name of plan
    ],
)
def test_what_cannot_be_measured_is_one_line_and_exit_code_2(words, error, capsys):
    assert main(words.split()) == 2
    assert error in capsys.readouterr().err


def test_memory_that_a_measurement_may_take_by_hand():
    world = this_process()
    with SmallSpeed(**STEP).workload(world, "adamw") as work:
        allowed = [
            statistics_bytes(NoiseMeter(work.run.model, geometries=[name]).tap)
            for name in ("manhattan", "nuclear")
        ]
    assert allowed == [4 * 228, 7 * 8 * 16]


def test_growth_by_hand():
    # 20 steps at a MiB each, four in a fifth: medians 1.5, 5.5, 9.5, 13.5 and 17.5.
    assert growth("", [2**20 * step for step in range(20)]) == {
        "growth_mib": 8.0,
        "growth_mib_after_warm_up": 12.0,
    }


def test_profile_names_every_phase_of_a_measured_step_and_leaves_a_trace(tmp_path):
    trace = tmp_path / "trace.json"
    (row,) = SmallProfile(**STEP, geometry="nuclear", steps=1, trace=trace, operators=1000).run()
    phases = {entry["phase"]: entry["seconds"] for entry in row["phases"]}
    assert set(phases) >= {"data", "forward", "backward", "measurement", "optimizer"}
    assert min(phases.values()) > 0
    assert sum(phases.values()) == pytest.approx(row["seconds"], abs=1e-5)
    assert json.loads(trace.read_text())["traceEvents"]
    assert "aten::mm" in {entry["operator"] for entry in row["operators"]}


def test_a_run_that_ends_before_its_first_step_is_reported(monkeypatch):
    monkeypatch.setattr("benchmarks.startup.sys.executable", "false")
    with pytest.raises(InputError, match="ended before its first step: no output"):
        list(Startup(starts=1, warm=True).run())
