import json

from gns_pretrain.runs.history import (
    append_end,
    append_event,
    append_start,
    directory_of_requeued_job,
    read_provenance,
    read_starts,
    recorded_environment,
    write_provenance,
)


def test_start_records_the_environment_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    for name in ("SLURM_JWT", "WANDB_API_KEY", "NCCL_PROXY_LOGIN", "TORCH_HUB_AUTH", "slurm_jwt"):
        monkeypatch.setenv(name, "https://me:secret@host")
    append_start(tmp_path, nodes=["n1", "n1", "n2"], gpu={"gpu": None})
    (start,) = read_starts(tmp_path)
    assert (start["ranks"], start["nodes"]) == (3, ["n1", "n2"])
    assert start["environment"]["NCCL_DEBUG"] == "WARN"
    assert "secret" not in json.dumps(start)


def test_only_what_changes_speed_or_numbers_is_recorded():
    assert recorded_environment({"OMP_NUM_THREADS": "1", "HOME": "/root"}) == {
        "OMP_NUM_THREADS": "1"
    }


def test_torn_line_is_left_out(tmp_path):
    append_end(tmp_path, "stopped")
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"event": "sta')
    assert [event["event"] for event in read_starts(tmp_path)] == ["end"]


def test_requeued_job_finds_the_fresh_folder_it_has_begun(tmp_path, monkeypatch):
    for name, job in (("run", "11"), ("run-2", "12")):
        (tmp_path / name).mkdir()
        append_event(tmp_path / name, "start", slurm={"job": job, "starts": 0})
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert directory_of_requeued_job(tmp_path / "run") is None  # its first start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert directory_of_requeued_job(tmp_path / "run") == tmp_path / "run-2"


def test_a_run_under_an_agent_of_w_and_b_has_the_id_that_the_agent_chose(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    write_provenance(tmp_path, "", "data")
    assert read_provenance(tmp_path)["run_id"] != "chosen"  # it would be that of many runs
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    (tmp_path / "run.json").unlink()
    write_provenance(tmp_path, "", "data")
    assert read_provenance(tmp_path)["run_id"] == "chosen"
