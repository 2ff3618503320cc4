"""scripts/measure_noise.py: the first sequences in file order, jackknife intervals, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from gns_pretrain.data import settings
from gns_pretrain.data.batches import read_in_order
from gns_pretrain.data.shards import TokenShards
from gns_pretrain.errors import InputError
from gns_pretrain.launch.measure_noise import MeasurementRequest, Report, measure
from gns_pretrain.model.huggingface import ExportedText, export_hf_folder
from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.parallel.mesh import World
from gns_pretrain.training.checkpoint import Checkpoints
from gns_pretrain.training.checkpoint_reader import load_model
from tests.settings import SEQUENCE_LENGTH, odd_model

ROOT = Path(__file__).parents[3]
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
    state = {"step": 1}
    return Checkpoints(folder, keep=1, world=ALONE).save(model, AdamWSettings().build(model), state)


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
    sequences = read_in_order(TokenShards.open(shards, "validation"), SEQUENCE_LENGTH, 0, SEQUENCES)
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
    ("changes", "message"),
    [
        ({"num_sequences": 2}, r"--num-sequences=2 makes one sample .* use at least 4"),
        ({"num_sequences": 5}, r"--num-sequences=5 cannot be split .* multiple of 2"),
        ({"num_sequences": 0}, r"--num-sequences=0 must be at least 1"),
        ({"micro_batch_size": 0}, r"--micro-batch-size=0 must be at least 1"),
        ({"sequence_length": 0}, r"--sequence-length=0 must be at least 1"),
        ({"num_sequences": 4000}, r"--num-sequences=4000 is more than the 24 validation"),
        ({"estimate": ["best"]}, r"--estimate=\[best\] is not known; use one of plug_in, debiased"),
    ],
)
def test_bad_request_is_named(changes, message, checkpoint, shards):
    with pytest.raises(InputError, match=message):
        measure(request(checkpoint, shards, **changes))


@pytest.fixture
def run(model, tmp_path) -> Path:
    """A step folder in a run directory, of a run on embedded text of its own vocabulary."""
    text = {"path": "embedded", "sequence_length": SEQUENCE_LENGTH, "embedded_vocab_size": 300}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": text}))
    state = {"step": 1}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, world=ALONE)
    return checkpoints.save(model, AdamWSettings().build(model), state)


def test_a_runs_own_length_is_measured_and_a_longer_one_is_noted(run, shards, tmp_path):
    quick = {"geometry": ["euclidean"], "interval": False}
    alone, notes = content(measure(request(run, shards, sequence_length=None, **quick)))
    assert notes == []
    same, _ = content(measure(request(run, shards, **quick)))
    assert alone == same
    beyond = f"goes beyond the {SEQUENCE_LENGTH} tokens that the model was trained on"
    _, notes = content(measure(request(run, shards, sequence_length=20, **quick)))
    assert beyond in notes[0]
    # A Hugging Face model names its positions.
    export_hf_folder(load_model(run), tmp_path / "hf", ExportedText(SEQUENCE_LENGTH))
    exported, notes = content(
        measure(request(tmp_path / "hf", shards, sequence_length=None, **quick))
    )
    assert notes == []
    assert exported == same
    _, notes = content(measure(request(tmp_path / "hf", shards, sequence_length=20, **quick)))
    assert beyond in notes[0]


def test_embedded_text_is_that_of_the_run(run, shards, monkeypatch):
    made = []

    def ensure_embedded(*, vocab_size: int) -> Path:
        made.append(vocab_size)
        return shards

    monkeypatch.setattr(settings, "ensure_embedded", ensure_embedded)
    quick = {"geometry": ["euclidean"], "interval": False}
    assert measure(request(run, Path("embedded"), **quick)) == measure(
        request(run, shards, **quick)
    )
    assert made == [300]


def content(report: Report | None) -> tuple[dict, list[str]]:
    assert report is not None
    return report.as_dict(), report.notes


def test_cross_fitted_interval_is_left_out_with_a_note_where_a_half_would_be_empty(
    checkpoint, shards
):
    changes = {"estimate": ["plug_in", "cross_fitted"], "geometry": ["manhattan"]}
    three, notes = content(measure(request(checkpoint, shards, num_sequences=6, **changes)))
    assert three["manhattan"]["standard_error"] > 0
    assert three["manhattan"]["cross_fitted"]["standard_error"] is None
    assert notes == [
        "no standard error for cross_fitted: each half of the batch needs 2 micro-batches; "
        "use --num-sequences=8 or more"
    ]
    four, notes = content(measure(request(checkpoint, shards, num_sequences=8, **changes)))
    assert four["manhattan"]["cross_fitted"]["standard_error"] > 0
    assert notes == []


def test_interval_of_too_few_micro_batches_is_left_out_with_a_note(checkpoint, shards):
    changes = {"num_sequences": 4, "geometry": ["euclidean"]}
    two, notes = content(measure(request(checkpoint, shards, **changes)))
    assert two["euclidean"]["standard_error"] is None
    assert [note.partition(":")[0] for note in notes] == ["no standard error"]
    assert notes[0].endswith("there are 2; use --num-sequences=6 or more")
    _, notes = content(measure(request(checkpoint, shards, interval=False, **changes)))
    assert notes == []


@pytest.mark.parametrize("geometry", ["euclidean", "manhattan", "nuclear"])
def test_weight_that_is_not_finite_gives_no_report(geometry, shards, tmp_path):
    ruined = Llama(odd_model())
    ruined.init_weights(seed=4)
    ruined.layers[0].attention.wq.weight.data[0, 0] = torch.nan
    state = {"step": 1}
    folder = Checkpoints(tmp_path, keep=1, world=ALONE).save(
        ruined, AdamWSettings().build(ruined), state
    )
    with pytest.raises(InputError, match=rf"no noise scale: {geometry} noise is nan; .*earlier"):
        measure(request(folder, shards, geometry=[geometry]))


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
