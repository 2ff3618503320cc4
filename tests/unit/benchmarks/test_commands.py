import json

import pytest
import torch

from benchmarks.cli import COMMANDS, cpu_plan, gpu_plan, main, parser
from benchmarks.memory import growth
from benchmarks.profile import profile_steps
from benchmarks.speed import cost_rows, product_share, statistics_bytes
from benchmarks.startup import measure_startup
from benchmarks.workload import Workload, training
from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig

CPU = torch.device("cpu")
# One block: four matrices 4 x 4 and three 6 x 4; 136 + 8 + 2 * 40 + 4 = 228 weights.
MODEL = LlamaConfig(
    name="test", dim=4, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=6, vocab_size=10
)
WORKLOAD = Workload(MODEL, sequence_length=4, batch_size=4, micro_batch_size=2)


def test_every_part_runs_and_says_when_where_and_by_which_command(tmp_path, monkeypatch):
    # Worker processes would import torch first: the pool has tests of its own.
    monkeypatch.setattr("benchmarks.data.available_cores", lambda: 1)
    path = tmp_path / "figures.jsonl"
    assert main(["all", "--quick", "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    parts = [row["command"].split("benchmark.py ")[1].split()[0] for row in rows]
    assert set(parts) == set(COMMANDS)
    for row in rows:
        assert row["date"]
        assert row["machine"]["processor"]
        assert row["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("plan", [cpu_plan, gpu_plan])
def test_plans_name_commands_and_arguments_that_exist(plan):
    for words in plan():
        assert parser(None).parse_args(words).command in COMMANDS


def test_a_part_that_fails_leaves_the_others_their_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.cli.quick_plan",
        lambda folder: [["memory", "--steps", "1"], ["paper", "--ranks", "8"]],
    )
    path = tmp_path / "figures.jsonl"
    assert main(["all", "--quick", "--json", str(path)]) == 1
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert "--steps 1 must be at least 10" in first["failed"]
    assert "markdown" in second


def test_share_of_the_product_rate_by_hand():
    # 100 tokens/s of 6 P + 6 L D T = 3e9 operations each, on a chip that does 1e12.
    assert product_share(100.0, 3e9, 1e12) == pytest.approx(0.3)


def test_cost_of_a_measurement_by_hand():
    # Measured steps take 1.2, 1.3 and 1.4 times as long: 30 % every step, 0.3 % every 100.
    row = cost_rows([1.2, 2.6, 1.4], [1.0, 2.0, 1.0])
    assert (row["cost_every_step_percent"], row["cost_every_100_steps_percent"]) == (30.0, 0.3)


def test_memory_that_a_measurement_may_take_by_hand():
    with training(WORKLOAD, CPU, ["manhattan", "nuclear"]) as trained:
        allowed = {name: statistics_bytes(meter.tap) for name, meter in trained.meters.items()}
    assert allowed == {"manhattan": 4 * 228, "nuclear": 7 * 8 * 16}


def test_growth_by_hand():
    # 20 steps at a MiB each, four in a fifth: medians 1.5, 5.5, 9.5, 13.5 and 17.5.
    assert growth("", [2**20 * step for step in range(20)]) == {
        "growth_mib": 8.0,
        "growth_mib_after_warm_up": 12.0,
    }


def test_profile_names_every_phase_of_a_measured_step_and_leaves_a_trace(tmp_path):
    trace = tmp_path / "trace.json"
    row = profile_steps(WORKLOAD, device=CPU, geometry="nuclear", steps=1, trace=trace)
    phases = {entry["phase"]: entry["seconds"] for entry in row["phases"]}
    assert set(phases) >= {"data", "forward", "backward", "measurement", "optimizer"}
    assert min(phases.values()) > 0
    assert sum(phases.values()) == pytest.approx(row["seconds"], abs=1e-5)
    assert json.loads(trace.read_text())["traceEvents"]
    assert "aten::mm" in {entry["operator"] for entry in row["operators"]}


def test_a_run_that_ends_before_its_first_step_is_reported(monkeypatch):
    monkeypatch.setattr("benchmarks.startup.sys.executable", "false")
    with pytest.raises(InputError, match="ended before its first step: no output"):
        measure_startup([], starts=1, cold=False)


def test_a_batch_of_one_sample_cannot_be_measured(capsys):
    words = ["speed", "--model", "demo", "--batch-size", "2", "--micro-batch-size", "2"]
    assert main(words) == 2
    assert "one micro-batch" in capsys.readouterr().err
