"""The command, on a problem that takes seconds."""

import json
import sys
from pathlib import Path

import pytest

from gns_pretrain.commands.noisy_quadratic import main
from gns_pretrain.errors import InputError

SMALL = ["--dimension", "20", "--samples", "1024", "--seeds", "4", "--target-loss", "0.05"]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["noisy-quadratic", *SMALL, *words])
    main()


def test_every_policy_is_ranked_and_none_beats_the_best_schedule(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figure = tmp_path / "figure.png"
    run(monkeypatch, "--json", "--out", str(figure))
    found = json.loads(capsys.readouterr().out)
    assert figure.stat().st_size > 10_000
    results = found["policies"]
    assert len(results) == 18
    for result in results:
        slack = 4 * (result["error"] or 0.0) + 1e-6
        assert result["loss"] >= result["best"] - slack
        assert result["constant"] >= result["best"]
    excess = [result["loss"] / result["best"] for result in results]
    assert excess == sorted(excess)
    assert len(found["steps"]) == 3
    for result in results:  # a step takes that of 16 sequences besides its own
        assert result["time"] == pytest.approx(1024 + 16 * result["steps"])


def test_a_policy_of_ones_own_stands_beside_constant_batches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--only policies --geometry manhattan --theta 0.5 --json"
    run(monkeypatch, *words.split())
    found = json.loads(capsys.readouterr().out)
    names = {result["policy"] for result in found["policies"]}
    assert names == {"constant 16", "constant 64", "constant 256", "adaptive"}
    assert found["steps"] == []


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--target-loss 9", "--target-loss=9"),
        ("--batch-size 12", "--batch-size=12"),
        ("--dimension 0", "--dimension=0"),
        ("--policy adaptive --theta 0", "--theta=0"),
        ("--policy staged", "--stage-tokens"),
        ("--only policies --geometry nuclear", "geometry=nuclear"),
        ("--only policies --geometry adam", "geometry=adam reads an optimizer"),
    ],
)
def test_options_out_of_bounds_are_named(
    monkeypatch: pytest.MonkeyPatch, words: str, error: str
) -> None:
    with pytest.raises(InputError, match=error):
        run(monkeypatch, *words.split())
