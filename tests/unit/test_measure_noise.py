"""scripts/measure_noise.py: the first sequences in file order, jackknife intervals, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gns_pretrain.data.batches import read_in_order
from gns_pretrain.data.tokens import TokenSplit
from gns_pretrain.distributed.checkpoint import Checkpoints
from gns_pretrain.distributed.mesh import World
from gns_pretrain.errors import InputError
from gns_pretrain.measure_noise import MeasurementRequest, measure
from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.adamw import AdamWSettings, build_adamw
from gns_pretrain.state import TrainState
from tests.settings import SEQUENCE_LENGTH, odd_model

ROOT = Path(__file__).parents[2]
ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")
SEQUENCES, SAMPLES = 12, 6


@pytest.fixture(scope="module")
def model() -> Llama:
    model = Llama(odd_model())
    model.init_weights(seed=4)
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    state = TrainState(batch_size=8, micro_batch_size=2, step=1)
    return Checkpoints(folder, keep=1, world=ALONE).save(
        model, build_adamw(model, AdamWSettings()), state
    )


def request(checkpoint: Path, shards: Path, **changes) -> MeasurementRequest:
    values = {
        "num_sequences": SEQUENCES,
        "micro_batch_size": SEQUENCES // SAMPLES,
        "sequence_length": SEQUENCE_LENGTH,
        "device": "cpu",
    }
    return MeasurementRequest(checkpoint, shards, **(values | changes))


def manhattan(gradients: torch.Tensor) -> float:
    """Eqs. 13, 20 and 22 of stacked sample gradients [R, P], two sequences each."""
    count = len(gradients)
    mean = gradients.mean(0)
    variance = 2 * count / (count - 1) * (gradients.square().mean(0) - mean.square())
    return (variance.clamp_min(0).sqrt().sum() / mean.abs().sum()).item() ** 2


def sample_gradients(model: Llama, shards: Path) -> torch.Tensor:
    sequences = read_in_order(TokenSplit.open(shards, "validation"), SEQUENCE_LENGTH, 0, SEQUENCES)
    rows = []
    for batch in sequences.split(SEQUENCES // SAMPLES):
        model.zero_grad()
        model(batch[:, :-1], batch[:, 1:]).backward()
        rows.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    model.zero_grad()
    return torch.stack(rows)


def test_noise_scale_and_interval_are_those_of_the_first_sequences_in_file_order(
    model, checkpoint, shards
):
    report = measure(request(checkpoint, shards))
    assert report is not None
    values = report.as_dict()
    gradients = sample_gradients(model, shards)
    assert (values["num_samples"], values["batch_size"]) == (SAMPLES, SEQUENCES)
    assert values["manhattan"]["noise_scale"] == pytest.approx(manhattan(gradients), rel=1e-4)
    left_out = torch.tensor(
        [manhattan(gradients[torch.arange(SAMPLES) != j]) for j in range(SAMPLES)]
    )
    error = ((SAMPLES - 1) / SAMPLES * (left_out - left_out.mean()).square().sum()).sqrt().item()
    # A difference of float32 sums: the interval keeps fewer digits than the estimate.
    assert values["manhattan"]["standard_error"] == pytest.approx(error, rel=1e-2)
    assert set(values) == {"num_samples", "batch_size", "euclidean", "manhattan", "nuclear"}


def test_micro_batches_of_another_size_keep_the_euclidean_signal(checkpoint, shards):
    fine = measure(request(checkpoint, shards, interval=False))
    coarse = measure(request(checkpoint, shards, interval=False, micro_batch_size=4))
    assert fine is not None
    assert coarse is not None
    signal = fine.as_dict()["euclidean"]["signal"]
    assert coarse.as_dict()["euclidean"]["signal"] == pytest.approx(signal, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_sequences": 2}, r"--num-sequences=2 makes one sample .* use at least 4"),
        ({"num_sequences": 5}, r"--num-sequences=5 cannot be split .* multiple of 2"),
        ({"num_sequences": 4000}, r"--num-sequences=4000 is more than the 24 validation"),
        ({"estimates": ["best"]}, r"noise_scale.estimates holds best"),
    ],
)
def test_bad_request_is_named(changes, told, checkpoint, shards):
    with pytest.raises(InputError, match=told):
        measure(request(checkpoint, shards, **changes))


def test_two_ranks_under_torchrun_print_the_numbers_of_one_process(checkpoint, shards, tmp_path):
    expected = measure(request(checkpoint, shards, interval=False))
    assert expected is not None
    words = [
        *("--checkpoint", str(checkpoint), "--data", str(shards), "--num-sequences"),
        *(str(SEQUENCES), "--micro-batch-size", "2", "--sequence-length", str(SEQUENCE_LENGTH)),
        *("--device", "cpu", "--no-interval", "--json"),
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    answer = subprocess.run(
        [*launcher, "--nproc-per-node", "2", "scripts/measure_noise.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    for geometry, values in expected.as_dict().items():
        if isinstance(values, dict):
            rel = 1e-4 if geometry == "nuclear" else 1e-5
            assert found[geometry]["noise_scale"] == pytest.approx(values["noise_scale"], rel=rel)
