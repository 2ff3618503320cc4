"""Going on from what is trained: a run, a checkpoint, a Hugging Face folder."""

import dataclasses
import json
import shutil

import pytest
import torch

from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.errors import InputError
from gns_pretrain.launch.train import launch
from gns_pretrain.model.huggingface import ExportedText, export_hf_folder
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.optim.sgd import SGDSettings
from gns_pretrain.optim.signum import SignumSettings
from gns_pretrain.runs.history import read_provenance
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training.checkpoint_reader import load_model
from gns_pretrain.training.evaluate import EvaluationSettings
from gns_pretrain.training.initialize import InitSettings, begin_from, find_source
from gns_pretrain.training.schedule import ScheduleSettings
from tests.runs import ALONE, train_here
from tests.settings import SEQUENCE_LENGTH, odd_model, small_run, without_times

# Its factor at a step does not depend on the budget.
STEADY = ScheduleSettings("constant", warmup_fraction=0.0)
# Its first line tells the loss of the weights after one step that hardly moves them.
STILL = {"optimizer": AdamWSettings(lr=1e-12), "steps": 1}


def steady(folder, data, **changes):
    return small_run(folder, data, **({"schedule": STEADY} | changes))


def lines_of(folder, name="small"):
    return [without_times(line) for line in read_records(folder / name / "metrics.jsonl")]


def validation_loss(folder, name="small"):
    return [line["loss"] for line in lines_of(folder, name) if line["kind"] == "validation"][-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards):
    """A finished run of 10 steps, with checkpoints of steps 5 and 10."""
    folder = tmp_path_factory.mktemp("trained")
    assert train_here(steady(folder, shards, steps=10)) == 0
    return folder / "small"


def test_a_finished_run_goes_on_to_a_larger_budget_as_if_it_had_never_ended(
    trained, tmp_path, shards
):
    assert train_here(steady(tmp_path / "whole", shards, steps=20)) == 0
    going_on = {"from": str(trained), "what": "all"}
    # Stopped and resumed on the way, from its own checkpoint: what it began from may be gone.
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    going_on["from"] = str(copy)
    config = steady(tmp_path / "on", shards, steps=20, init=going_on)
    assert train_here(config, stop_after=3) == 75
    shutil.rmtree(copy)
    assert train_here(config) == 0
    expected = [line for line in lines_of(tmp_path / "whole") if line["step"] > 10]
    assert lines_of(tmp_path / "on") == expected
    began = read_provenance(tmp_path / "on" / "small")["init"]
    assert (began["from"], began["step"]) == (str(copy / "checkpoints" / "step_00000010"), 10)
    assert len(began["sha256"]) == 64


def test_a_start_that_saved_nothing_begins_from_the_source_again(trained, tmp_path, shards):
    config = steady(tmp_path, shards, steps=20, init={"from": str(trained), "what": "all"})
    config.checkpoint.every_steps = 100

    def crash():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train_here(config, meanwhile={4: crash})
    assert train_here(config) == 0
    steps = [line["step"] for line in lines_of(tmp_path) if line["kind"] == "train"]
    assert steps == list(range(11, 21))


def test_weights_alone_begin_a_run_with_any_other_setting(trained, tmp_path, shards):
    older = trained / "checkpoints" / "step_00000005"
    for source, expected in ((trained, -1), (older, None)):
        init = {"from": str(source), "what": "weights"}
        config = steady(tmp_path / source.name, shards, init=init, **STILL)
        assert train_here(config) == 0
        lines = lines_of(tmp_path / source.name)
        assert lines[0]["step"] == 1
        if expected:
            losses = [line["loss"] for line in lines_of(trained.parent) if "tokens" in line]
            assert validation_loss(tmp_path / source.name) == pytest.approx(losses[-1], abs=1e-6)
    other = steady(
        tmp_path / "other",
        shards,
        steps=12,
        init={"from": str(older), "what": "weights"},
        model=odd_model(parametrization="mup", mup_base_dim=9),
        optimizer=SignumSettings(lr=1e-4),
        micro_batch_size=4,
        batch_size=BatchSizeSettings(initial=16),
        schedule=ScheduleSettings(),
    )
    assert train_here(other) == 0


def test_hugging_face_weights_begin_a_run(trained, tmp_path, shards):
    model = load_model(trained / "checkpoints" / "step_00000010")
    export_hf_folder(model, tmp_path / "hf", ExportedText(max_positions=SEQUENCE_LENGTH))
    init = {"from": str(tmp_path / "hf"), "what": "weights"}
    assert train_here(steady(tmp_path, shards, init=init, **STILL)) == 0
    expected = validation_loss(trained.parent)
    assert validation_loss(tmp_path) == pytest.approx(expected, abs=1e-6)
    began = read_provenance(tmp_path / "small")["init"]
    assert (began["from"], began["step"]) == (str(tmp_path / "hf"), None)


@pytest.mark.parametrize("what", ["all", "weights", "hf"])
def test_two_ranks_begin_from_what_one_process_trained(trained, what, tmp_path, shards):
    init = {"from": str(trained), "what": what}
    if what == "hf":
        model = load_model(trained / "checkpoints" / "step_00000010")
        export_hf_folder(model, tmp_path / "hf", ExportedText(max_positions=SEQUENCE_LENGTH))
        init = {"from": str(tmp_path / "hf"), "what": "weights"}
    one = steady(tmp_path / "one", shards, steps=12, init=init)
    two = dataclasses.replace(one, output_directory=str(tmp_path / "two"))
    two.launch = dataclasses.replace(one.launch, nproc_per_node=2)
    assert train_here(one) == 0
    assert launch(two) == 0
    pairs = zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True)
    for ours, theirs in pairs:
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_a_branch_has_its_own_batch_and_learning_rate_and_the_optimizer_state_of_its_source(
    trained, tmp_path, shards, capsys
):
    branch = steady(
        tmp_path,
        shards,
        steps=20,
        init={"from": str(trained), "what": "all"},
        micro_batch_size=4,
        batch_size=BatchSizeSettings(initial=16),
        optimizer=AdamWSettings(lr=5e-3, beta1=0.5, tie_to_tokens=True),
    )
    assert train_here(branch) == 0
    (others,) = (x for x in capsys.readouterr().out.splitlines() if "this run's are others" in x)
    assert others.partition(": ")[2].split(", ") == [
        "batch_size.initial 8 (here 16)",
        "optimizer.beta1 0.9 (here 0.5)",
        "optimizer.lr 0.01 (here 0.005)",
        "optimizer.tie_to_tokens False (here True)",
    ]
    train = [line for line in lines_of(tmp_path) if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(11, 16))
    assert {line["batch_size"] for line in train} == {16}
    assert {line["lr"] for line in train} == {5e-3}
    saved = tmp_path / "small" / "checkpoints" / "step_00000015"
    state = json.loads((saved / "train_state.json").read_text())
    assert state["samples"] == 10 * 8 + 5 * 16


def test_an_adaptive_run_goes_on_with_its_batch_and_averages(tmp_path, shards):
    settings = {
        "micro_batch_size": 1,
        "batch_size": BatchSizeSettings(
            "adaptive", initial=8, micro_batch_max=2, theta=0.5, cap=64, decide_every_steps=3
        ),
        "noise_scale": NoiseScaleSettings(["manhattan"], every_steps=2),
    }
    assert train_here(steady(tmp_path / "whole", shards, steps=24, **settings)) == 0
    first = steady(tmp_path / "first", shards, steps=24, **settings)
    assert train_here(first, stop_after=8) == 75
    init = {"from": str(tmp_path / "first" / "small"), "what": "all"}
    assert train_here(steady(tmp_path / "on", shards, steps=24, init=init, **settings)) == 0
    went_on = lines_of(tmp_path / "on")
    assert went_on == [line for line in lines_of(tmp_path / "whole") if line["step"] > 8]
    assert min(line["batch_size"] for line in went_on if line["kind"] == "train") > 8


def emptied(folder):
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()


def cut(folder):
    for file in folder.glob("checkpoints/step_00000010/*.distcp"):
        file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "source", "changes", "message"),
    [
        (None, "nothing", {}, "init.from=.*nothing is no run directory, step_* folder or Hugging"),
        (emptied, "", {}, "has no whole checkpoint (it has none yet)"),
        (cut, "checkpoints/step_00000010", {}, "not a whole checkpoint (__0_0.distcp has"),
        (None, "", {"model": odd_model(dim=36)}, "another model: dim 18 (here 36); use model.dim="),
        (None, "", {"model": odd_model(vocab_size=64)}, "use model.vocab_size=.*, or data= of its"),
        (None, "", {"steps": 10}, "token_budget=1,280 includes the 1,280 tokens of init.from"),
        (None, None, {}, "init.what=all needs something to go on from; give init.from"),
        (None, "", {"what": "everything"}, "init.what=everything .*weights, all"),
        (None, "", {"where": "x"}, "init.where: there is no such setting"),
    ],
)  # fmt: skip
def test_what_cannot_be_gone_on_from_is_refused_before_anything_is_written(
    damage, source, changes, message, trained, tmp_path, shards
):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    if damage:
        damage(copy)
    changes = dict(changes)
    init = {"from": None if source is None else str(copy / source), "what": "all"}
    init |= {name: changes.pop(name) for name in ("what", "where") if name in changes}
    pattern = ".*".join(map(_escaped, message.split(".*")))
    with pytest.raises(InputError, match=pattern):
        train_here(steady(tmp_path / "on", shards, **({"steps": 20, "init": init} | changes)))
    assert not (tmp_path / "on").exists()


def _escaped(text):
    return text.replace("(", r"\(").replace(")", r"\)").replace("*", r"\*").replace(".", r"\.")


def test_a_newer_damaged_checkpoint_is_passed_over(trained, tmp_path, shards):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    cut(copy)
    init = {"from": str(copy), "what": "all"}
    assert train_here(steady(tmp_path, shards, steps=12, init=init)) == 0
    assert read_provenance(tmp_path / "small")["init"]["step"] == 5


def test_all_of_another_optimizer_or_sequence_length_is_refused(trained, tmp_path, shards, capsys):
    init = {"from": str(trained), "what": "all"}
    config = steady(tmp_path, shards, init=init)
    config.data.sequence_length = SEQUENCE_LENGTH // 2
    with pytest.raises(InputError, match=r"sequences of 16 tokens.*sequence_length=8"):
        train_here(config)
    hybrid = steady(tmp_path, shards, init=init, optimizer=SignumSettings(lr=1e-4))
    assert launch(hybrid) == 2
    error = capsys.readouterr().err
    assert "cannot be gone on from with this optimizer" in error
    assert error.count("\n") == 1


def test_state_of_another_rule_is_refused_though_its_tensors_fit(tmp_path, shards):
    """Signum's momentum is an average of gradients, SGD's a sum, 20 times as large."""
    source = steady(tmp_path, shards, steps=2, optimizer=SignumSettings(lr=1e-4))
    assert train_here(source) == 0
    init = {"from": str(tmp_path / "small"), "what": "all"}
    other = steady(tmp_path / "on", shards, init=init, optimizer=SGDSettings(momentum=0.9))
    with pytest.raises(InputError, match=r"with this optimizer \(.*SGD.*Signum.*use its optimizer"):
        train_here(other)
    same = steady(tmp_path / "on", shards, run_name="same", init=init, optimizer=source.optimizer)
    assert train_here(same, stop_after=1) == 75


def test_how_often_is_evaluated_may_change_when_a_run_resumes(tmp_path, shards):
    config = steady(tmp_path, shards)
    assert train_here(config, stop_after=10) == 75
    every = EvaluationSettings(every_tokens=5 * 8 * SEQUENCE_LENGTH, num_sequences=7)
    assert train_here(dataclasses.replace(config, evaluation=every)) == 0
    steps = [line["step"] for line in lines_of(tmp_path) if line["kind"] == "validation"]
    assert steps == [1, 10, 15, 20]


def test_hyperparameters_of_the_source_do_not_come_along(trained, shards, tmp_path):
    """Neither learning rate nor betas nor weight decay, which its checkpoint has."""
    model = load_model(trained / "checkpoints" / "step_00000010")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.7, 0.8), weight_decay=0.3)
    settings = InitSettings(str(trained), "all")
    source = find_source(settings)
    assert begin_from(source, settings, model, optimizer, ALONE)["step"] == 10
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-3, (0.7, 0.8), 0.3)
    assert {int(state["step"]) for state in optimizer.state.values()} == {10}


def test_run_json_names_what_a_second_start_found_where_the_first_saved_nothing(
    trained, tmp_path, shards
):
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    shutil.rmtree(source / "checkpoints" / "step_00000010")
    config = steady(tmp_path, shards, init={"from": str(source), "what": "weights"})
    config.checkpoint.every_steps = 100

    def crash():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train_here(config, meanwhile={4: crash})
    assert read_provenance(tmp_path / "small")["init"]["step"] == 5
    copied = "checkpoints/step_00000010"
    shutil.copytree(trained / copied, source / copied)
    assert train_here(config) == 0
    assert read_provenance(tmp_path / "small")["init"]["step"] == 10


def test_checkpoints_of_another_seed_are_not_resumed(trained, tmp_path, shards):
    assert train_here(steady(tmp_path, shards, steps=10, seed=1)) == 0
    mine = tmp_path / "small"
    (mine / "summary.json").unlink()
    shutil.rmtree(mine / "checkpoints")
    shutil.copytree(trained / "checkpoints", mine / "checkpoints")
    with pytest.raises(InputError, match=r"of seed=0, of another run than this one of seed=1"):
        train_here(steady(tmp_path, shards, steps=10, seed=1))
