from gns_pretrain.runs import directory
from gns_pretrain.runs.directory import fresh_directory, is_finished
from gns_pretrain.runs.history import read_provenance, write_provenance


def test_fresh_folder_takes_the_first_free_number_and_leaves_the_others(tmp_path):
    run = tmp_path / "run"
    assert fresh_directory(run) == run
    run.mkdir()
    (tmp_path / "run-2").mkdir()
    assert fresh_directory(run) == tmp_path / "run-3"
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


def test_two_starts_that_see_the_same_free_name_get_a_directory_each(tmp_path, monkeypatch):
    seen, free = [tmp_path / "run"], directory.fresh_directory
    monkeypatch.setattr(
        directory, "fresh_directory", lambda path: seen.pop() if seen else free(path)
    )
    (tmp_path / "run").mkdir()  # by the other start, after this one has looked
    assert directory.make_fresh(tmp_path / "run") == tmp_path / "run-2"
    assert (tmp_path / "run-2").is_dir()
