"""Two sources and documents that do not see each other: killed, resumed and on two ranks."""

import numpy as np
import pytest
import torch

from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training.trained_model import TrainedModel
from tests.conftest import write_shards
from tests.end_to_end import commands
from tests.settings import VOCABULARY, without_times


@pytest.fixture(scope="module")
def sources(tmp_path_factory, shards) -> str:
    """The text of the other tests, and a short one that is used up within the run."""
    folder = tmp_path_factory.mktemp("sources") / "steps_of_two"
    text = (2 * np.arange(700) % VOCABULARY).astype(np.uint16)
    write_shards(folder, {"train": [text], "validation": [text[:300]]}, VOCABULARY)
    return f"data.sources=[{{path:{shards},weight:0.55}},{{path:{folder},weight:0.45}}]"


def test_killed_or_on_two_ranks_a_mixture_is_the_same_run(tmp_path, shards, sources):
    def words(name: str, *more: str) -> list[str]:
        given = ("data=mixture", sources, "data.document_mask=true", f"run_name={name}", *more)
        return [
            word
            for word in commands.arguments(tmp_path, shards, *given)
            if not word.startswith(("data.path=", "run_name=small"))
        ]

    def lines(name: str) -> list[dict]:
        return [without_times(r) for r in read_records(tmp_path / name / "metrics.jsonl")]

    assert commands.run(words("whole"), tmp_path / "log") == 0
    expected = lines("whole")
    assert "every sequence of steps_of_two has been used" in (tmp_path / "log").read_text()
    validation = [line for line in expected if line["kind"] == "validation"]
    for line in validation:
        own = [line["loss/shards"], line["loss/steps_of_two"]]
        assert line["loss"] == pytest.approx(0.55 * own[0] + 0.45 * own[1], rel=1e-12)
    assert validation[-1]["loss/steps_of_two"] < validation[-1]["loss/shards"]

    process = commands.start(words("killed"), tmp_path / "log")
    commands.wait_for_line(tmp_path / "killed" / "metrics.jsonl", 9, process)
    commands.kill_group(process)
    assert commands.run(words("killed"), tmp_path / "log") == 0
    assert "resumed from step" in (tmp_path / "log").read_text()
    assert lines("killed") == expected

    trained = TrainedModel.find(tmp_path / "whole")
    assert trained.text().eos_id == 0
    with torch.no_grad():
        logits = trained.load()(torch.tensor([[5, 0, 5, 6, 7], [9, 0, 5, 6, 7]]))
    torch.testing.assert_close(logits[0, 2:], logits[1, 2:])  # of one document, after another

    on_two = words("two", "launch.nproc_per_node=2", "parallel=fsdp")
    assert commands.run(on_two, tmp_path / "log") == 0
    for found, line in zip(lines("two"), expected, strict=True):
        assert found.keys() == line.keys()
        assert found["loss"] == pytest.approx(line["loss"], rel=1e-5)
