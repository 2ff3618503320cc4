import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.runs.directory import (
    fresh,
    is_finished,
    read_provenance,
    refuse_another_run,
    write_provenance,
)

SETTINGS = {"seed": 0, "model": {"dim": 8}, "launch": {"nproc_per_node": 1}}


def test_fresh_folder_takes_the_first_free_number_and_leaves_the_others(tmp_path):
    run = tmp_path / "run"
    assert fresh(run) == run
    run.mkdir()
    (tmp_path / "run-2").mkdir()
    assert fresh(run) == tmp_path / "run-3"
    assert run.is_dir()


def test_run_is_finished_only_by_its_summary(tmp_path):
    assert not is_finished(tmp_path)
    (tmp_path / "summary.json").write_text('{"state": "stopped"}')
    assert not is_finished(tmp_path)
    (tmp_path / "summary.json").write_text('{"state": "finished"}')
    assert is_finished(tmp_path)


def test_runs_have_ids_of_their_own_for_as_long_as_they_live(tmp_path):
    first, second = tmp_path / "run", tmp_path / "elsewhere" / "run"
    ids = []
    for folder in (first, second, first):
        write_provenance(folder, "seed: 0\n", "data")
        ids.append(read_provenance(folder)["run_id"])
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.parametrize("text", ["", '{"data_finger', "[]", "{}"])
def test_damaged_record_of_a_run_is_named(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json is missing or damaged; restore it"):
        refuse_another_run(tmp_path, before=SETTINGS, now=SETTINGS, data_fingerprint="a")


def test_changed_model_under_the_same_name_is_refused_and_named(tmp_path):
    now = SETTINGS | {"model": {"dim": 16}}
    with pytest.raises(InputError, match=r"model.dim was 8 and is now 16; use another run_name"):
        refuse_another_run(tmp_path, before=SETTINGS, now=now, data_fingerprint="a")


def test_changed_number_of_ranks_is_not_another_run(tmp_path):
    now = SETTINGS | {"launch": {"nproc_per_node": 4}}
    refuse_another_run(tmp_path, before=SETTINGS, now=now, data_fingerprint="a")


def test_changed_data_under_the_same_path_is_refused(tmp_path):
    write_provenance(tmp_path, "seed: 0\n", "first")
    with pytest.raises(InputError, match="on other data"):
        refuse_another_run(tmp_path, before=SETTINGS, now=SETTINGS, data_fingerprint="second")
    refuse_another_run(tmp_path, before=SETTINGS, now=SETTINGS, data_fingerprint="first")
