"""Which sequences a mixture of several sources has, in which order, and what cannot be mixed."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gns_pretrain.data.batches import Batches
from gns_pretrain.data.mixture import Mixture, Source, interleaved, shares_of
from gns_pretrain.data.order import SequenceOrder
from gns_pretrain.data.settings import DataSettings, SourceSettings, open_splits
from gns_pretrain.data.shards import TokenShards
from gns_pretrain.data.staging import staged
from gns_pretrain.errors import InputError
from gns_pretrain.training.evaluate import EvaluationSettings
from gns_pretrain.workloads import open_workload
from tests.conftest import write_shards
from tests.settings import odd_model, small_run

LENGTH, SEED = 4, 3
SIZES = {"few": 5, "some": 11, "many": 23}  # sequences of a source


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7))
def test_every_prefix_has_each_source_by_its_weight_within_one_sequence(shares):
    order = interleaved(tuple(shares))
    had = np.cumsum(order[:, None] == np.arange(len(shares)), axis=0)
    due = np.arange(1, len(order) + 1)[:, None] * np.array(shares) / sum(shares)
    assert (np.abs(had - due) < 1 - 1e-9).all()
    assert had[-1].tolist() == shares


def test_order_is_the_same_on_every_machine():
    # Noted once; a change would silently give resumed runs other data.
    assert interleaved((7, 3)).tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [([0.7, 0.3], [7, 3]), ([2.0, 1.0, 1.0], [2, 1, 1]), ([1e-3, 2.5], [1, 2500]), ([5.0], [1])],
)
def test_weights_are_taken_as_they_were_typed(weights, shares):
    assert shares_of(weights) == shares


def test_weights_that_need_too_long_a_period_are_refused_with_rounded_ones():
    with pytest.raises(InputError, match=r"weights 123456\.0, 654321\.0, .* to 0\.1587, 0\.8413"):
        shares_of([123456.0, 654321.0])


def write_source(folder: Path, number: int, sequences: int, **changes) -> Path:
    """Every token is 100 * number + the index of its sequence, so that a row says what it is."""
    tokens = (100 * number + np.arange(sequences).repeat(LENGTH)).astype(np.uint16)
    splits = {"train": [np.append(tokens, 0).astype(np.uint16)]}
    write_shards(folder, splits | {"validation": splits["train"]}, 1000)
    meta = json.loads((folder / "meta.json").read_text()) | {"tokenizer_sha256": "a" * 64}
    (folder / "meta.json").write_text(json.dumps(meta | changes))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {
        name: write_source(root / name, k, size) for k, (name, size) in enumerate(SIZES.items())
    }


def mixture_of(folders: dict[str, Path], shares=(1, 2, 4)) -> Mixture:
    return Mixture(
        [
            Source(name, share, TokenShards.open(folder, "train"))
            for share, (name, folder) in zip(shares, folders.items(), strict=True)
        ]
    )


def open_batches(mixture: Mixture, **ranks: int) -> Batches:
    device = torch.device("cpu")
    return Batches(mixture, sequence_length=LENGTH, seed=SEED, device=device, **ranks)


def rows(batches: Batches, cursor: int, batch_size: int, micro_batch_size: int) -> list[list[int]]:
    """What each micro-batch holds, by the first token of its rows."""
    micro_batches = batches.micro_batches(
        cursor, batch_size=batch_size, micro_batch_size=micro_batch_size
    )
    return [micro_batch[:, 0].tolist() for micro_batch in micro_batches]


def plain_reference(num_sequences: int, shares=(1, 2, 4)) -> list[int]:
    """One sequence after the other: whose turn it is, and the next of that source's own order."""
    had: Counter[int] = Counter()
    sequences = []
    for position in range(num_sequences):
        k = int(interleaved(tuple(shares))[position % sum(shares)])
        size = list(SIZES.values())[k]
        sequences.append(100 * k + int(SequenceOrder(size, SEED)(np.array([had[k]]))[0]))
        had[k] += 1
    return sequences


@pytest.fixture
def mixture(folders) -> Mixture:
    return mixture_of(folders)


def test_steps_hold_the_sequences_of_a_plain_reference_over_several_epochs(mixture):
    expected = plain_reference(160)
    batches = open_batches(mixture)
    cursor = 0
    for size in (8, 16, 4, 12, 40, 80):
        step = [row for micro_batch in rows(batches, cursor, size, 4) for row in micro_batch]
        assert sorted(step) == sorted(expected[cursor : cursor + size])
        cursor += size
    batches.close()


@pytest.mark.parametrize(("num_ranks", "micro_batch_size"), [(1, 12), (2, 3), (3, 2), (6, 2)])
def test_any_ranks_and_micro_batches_share_one_step(mixture, num_ranks, micro_batch_size):
    alone = open_batches(mixture)
    (whole,) = rows(alone, 36, 12, 12)
    alone.close()
    found = {}
    for rank in range(num_ranks):
        batches = open_batches(mixture, rank=rank, num_ranks=num_ranks)
        for number, micro_batch in enumerate(rows(batches, 36, 12, micro_batch_size)):
            found[number * num_ranks + rank] = micro_batch
        batches.close()
    assert [row for number in sorted(found) for row in found[number]] == whole


def test_no_place_in_a_step_is_kept_for_one_source(folders):
    # Interleaved alone, two equal sources alternate, and the even micro-batches are all of one.
    batches = open_batches(mixture_of({name: folders[name] for name in ("few", "many")}, (1, 1)))
    steps = [rows(batches, 8 * k, 8, 1) for k in range(100)]
    batches.close()
    of_the_first = np.mean(
        [[micro_batch[0] < 100 for micro_batch in step] for step in steps], axis=0
    )
    # Binomial(100, 1/2) at each of 8 places: five standard deviations.
    assert (np.abs(of_the_first - 0.5) < 0.25).all()


def test_counts_and_used_up_sources_follow_the_positions(mixture):
    batches = open_batches(mixture)
    sources, _ = mixture.locate(np.arange(200))
    for n in (0, 1, 6, 7, 34, 35, 36, 199):
        counts = np.bincount(sources[:n], minlength=3)
        assert mixture.counts(n) == counts.tolist()
        sizes = zip(counts, SIZES.items(), strict=True)
        names = [name for count, (name, size) in sizes if count >= size]
        assert batches.used_up(n) == names
    batches.close()


def settings_of(folders: dict[str, Path], **changes) -> DataSettings:
    sources = [SourceSettings(str(folder), 1.0) for folder in folders.values()]
    return DataSettings(
        **{"path": "mixture", "sources": sources, "sequence_length": LENGTH, **changes}
    )


def test_fingerprint_covers_tokens_and_weights(folders):
    def fingerprint(*weights: float) -> str:
        sources = [
            SourceSettings(str(folder), weight)
            for folder, weight in zip(folders.values(), weights, strict=True)
        ]
        return open_splits(settings_of(folders, sources=sources))[0].fingerprint

    assert fingerprint(1.0, 2.0, 3.0) == fingerprint(0.1, 0.2, 0.3)
    assert len({fingerprint(1, 1, 1), fingerprint(1, 2, 3), fingerprint(3, 2, 1)}) == 3
    single = DataSettings(path=str(folders["few"]), sequence_length=LENGTH)
    own = TokenShards.open(folders["few"], "train").fingerprint
    assert open_splits(single)[0].fingerprint == own  # as before there were mixtures


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 999}, "data.sources: .*/other has vocab_size=999 .* has 1000; prepare all"),
        ({"tokenizer_sha256": "b" * 64}, "tokenizer_sha256=bbb.* one tokenizer, such as --token"),
        ({"bos_id": 1}, "bos_id=1 in its meta.json, .* has None"),
    ],
)
def test_sources_of_different_tokenizers_are_refused(folders, tmp_path, changes, message):
    other = {"other": write_source(tmp_path / "other", 3, 5, **changes)}
    with pytest.raises(InputError, match=message):
        open_splits(settings_of(folders | other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "data.path=mixture has no sources; name them, as in"),
        ({"path": "data/c4"}, "data.sources is not read with data.path=data/c4; use data.path=mix"),
        (
            {"sources": [SourceSettings("a/few", 1.0), SourceSettings("b/few", 1.0)]},
            "data.sources names few more than once",
        ),
        ({"sources": [SourceSettings("nowhere", 1.0)]}, "sources: path=nowhere is not a folder"),
    ],
)
def test_sources_that_say_nothing_clear_are_refused(folders, changes, message):
    with pytest.raises(InputError, match=message):
        open_splits(settings_of(folders, **changes))


def test_source_without_a_path_is_refused():
    with pytest.raises(InputError, match=r"data\.sources\.path= is not a path; name one"):
        SourceSettings(weight=0.5)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weight_must_be_positive(weight):
    with pytest.raises(InputError, match=r"data\.sources\.weight=.* must be positive and finite"):
        SourceSettings("a", weight)


@pytest.mark.parametrize(
    ("num_sequences", "message"),
    [(2, "takes 0 sequences of many .* use more"), (30, "takes 10 sequences of few .* has 5")],
)
def test_each_source_has_validation_sequences(folders, tmp_path, num_sequences, message):
    evaluation = EvaluationSettings(num_sequences=num_sequences)
    changes = {"data": settings_of(folders), "model": odd_model(vocab_size=1000)}
    config = replace(small_run(tmp_path, tmp_path), evaluation=evaluation, **changes)
    with pytest.raises(InputError, match=message):
        open_workload(config).check()


def test_each_source_is_staged(folders, tmp_path):
    original = settings_of(folders, stage_to=str(tmp_path))
    copy = staged(original, log=lambda line: None)
    assert [Path(part.path).parent for part in copy.sources] == [tmp_path] * 3
    assert [part.name for part in copy.sources] == list(SIZES)
    assert [split.fingerprint for split in open_splits(copy)] == [
        split.fingerprint for split in open_splits(original)
    ]
