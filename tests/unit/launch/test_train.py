import errno
import os
import signal
from ctypes import c_bool
from dataclasses import replace
from multiprocessing.sharedctypes import RawValue
from pathlib import Path

import pytest
import torch

from gns_pretrain.config.checks import check_batch_size, check_layout
from gns_pretrain.errors import InputError, TrainingError, print_error
from gns_pretrain.launch import ranks
from gns_pretrain.launch import train as launch
from gns_pretrain.launch.ranks import SRUN, TORCHRUN, rank_info_from
from gns_pretrain.launch.train import taken
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, World, shard_group_size
from gns_pretrain.runs.history import read_provenance
from gns_pretrain.system import processes as cores
from gns_pretrain.system.processes import STOP_SIGNALS, StopRequest, threads_per_process
from gns_pretrain.system.slurm import first_host
from tests.settings import odd_model, small_run

ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")


def test_nothing_set_means_nobody_has_started_ranks():
    assert rank_info_from({}) is None
    assert rank_info_from({"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_batch_shell_of_a_job_is_no_rank_of_it():
    batch_shell = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert rank_info_from(batch_shell) is None


def torchrun(**more: str) -> dict[str, str]:
    return {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "29500",
    } | more


def test_torchrun_variables_give_the_place():
    assert rank_info_from(torchrun()) == RankInfo(5, 8, 1, 4, "env://")
    assert rank_info_from({"RANK": "0", "WORLD_SIZE": "1"}) == RankInfo(rendezvous="env://")


def test_torchrun_inside_slurm_counts_as_torchrun():
    assert rank_info_from(srun() | torchrun()) == RankInfo(5, 8, 1, 4, "env://")


def srun(**more: str) -> dict[str, str]:
    return {
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "4321",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
    } | more


def test_srun_ranks_meet_on_the_first_node_at_a_port_of_the_job():
    assert rank_info_from(srun()) == RankInfo(9, 16, 1, 8, "tcp://gpu07:24321")


def test_srun_meeting_point_can_be_set():
    place = rank_info_from(srun(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"))
    assert place is not None
    assert place.rendezvous == "tcp://127.0.0.1:29500"


def without(environment: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key != name}


@pytest.mark.parametrize("name", [*TORCHRUN, *SRUN])
def test_a_launchers_variables_that_are_there_in_part_are_refused(name):
    full = torchrun() if name in TORCHRUN else srun()
    with pytest.raises(InputError, match=f"the environment has no {name};"):
        rank_info_from(without(full, name))
    if name not in ("MASTER_ADDR", "SLURM_STEP_NODELIST"):
        with pytest.raises(InputError, match=f"{name}=one in the environment is not a number"):
            rank_info_from(full | {name: "one"})


def test_variables_that_only_name_the_others_make_no_rank():
    assert rank_info_from({"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}) is None
    # A batch script may export it for its tasks, whose ranks srun numbers.
    assert rank_info_from(srun(WORLD_SIZE="16")) == rank_info_from(srun())
    with pytest.raises(InputError, match=r"RANK=8 in the environment is not a number .* below 8"):
        rank_info_from(torchrun(RANK="8"))


def test_what_is_typed_in_a_shell_of_a_slurm_step_is_no_task(monkeypatch):
    monkeypatch.setattr(ranks, "is_typed_in_a_shell", lambda: True)
    terminal = {"SLURM_PTY_PORT": "4242", "SLURM_PROCID": "0"}
    assert rank_info_from(srun(SLURM_PROCID="0")) is not None  # a task that srun has started
    assert rank_info_from(srun(**terminal)) is None
    assert rank_info_from(srun(SLURM_PTY_PORT="4242")) is not None  # beside the one that has it
    monkeypatch.setattr(ranks, "is_typed_in_a_shell", lambda: False)
    assert rank_info_from(srun(**terminal)) is not None


def test_a_launchers_only_rank_is_not_asked_to_start_more(tmp_path, shards):
    config = small_run(tmp_path, shards)
    config.launch.nproc_per_node = 2
    with pytest.raises(InputError, match=r"launch.nproc_per_node=2, but RANK and WORLD_SIZE=1"):
        launch.check_run(config, RankInfo())
    launch.check_run(config, RankInfo(0, 4, 0, 2, "env://"))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,9],login", "gpu03"), ("a-b[1,4]", "a-b1")],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_hsdp_shards_within_a_node_by_default():
    hsdp = ParallelSettings(kind="hsdp")
    assert shard_group_size(hsdp, num_ranks=16, ranks_per_node=8) == 8
    assert shard_group_size(hsdp, num_ranks=4, ranks_per_node=4) == 2


def test_hsdp_group_that_does_not_divide_the_ranks_is_refused():
    settings = ParallelSettings(kind="hsdp", shard_size=3)
    with pytest.raises(InputError, match=r"parallel.shard_size=3 .* divisor of 4"):
        shard_group_size(settings, num_ranks=4, ranks_per_node=4)


def test_hsdp_shards_within_a_node_beside_tensor_parallelism():
    hsdp = ParallelSettings(kind="hsdp", tensor_size=2)
    assert shard_group_size(hsdp, num_ranks=16, ranks_per_node=8) == 4
    assert shard_group_size(hsdp, num_ranks=8, ranks_per_node=8) == 2
    with pytest.raises(InputError, match=r"shard_size=4 .* the 2 data-parallel ranks .*4 ranks"):
        shard_group_size(replace(hsdp, shard_size=4), num_ranks=4, ranks_per_node=4)


@pytest.mark.parametrize(
    ("parallel", "model", "rule"),
    [
        ({"tensor_size": 3}, {}, "tensor_size=3 does not divide the number of ranks, 4"),
        (
            {"tensor_size": 2},
            {},
            "tensor_size=2 does not divide model.num_heads=3; .* divisor of 1",
        ),
        ({"tensor_size": 4}, {"num_heads": 4, "dim": 24}, "tensor_size=4 .* model.num_kv_heads=1"),
        (
            {"tensor_size": 4},
            {"num_heads": 4, "num_kv_heads": 4, "dim": 24},
            "tensor_size=4 does not divide model.ffn_dim=26; use a divisor of 2",
        ),
    ],
)
def test_tensor_parallelism_that_does_not_fit_is_refused(parallel, model, rule, tmp_path, shards):
    config = small_run(
        tmp_path, shards, parallel=ParallelSettings(**parallel), model=odd_model(**model)
    )
    with pytest.raises(InputError, match=f"parallel.{rule}"):
        check_layout(config, num_ranks=4, ranks_per_node=4)


def test_tensor_parallelism_is_for_sharded_layouts():
    with pytest.raises(InputError, match=r"tensor_size=2 is for parallel=fsdp and hsdp"):
        ParallelSettings(kind="ddp", tensor_size=2)


def test_batch_is_split_over_data_parallel_ranks_alone(tmp_path, shards):
    config = small_run(tmp_path, shards, parallel=ParallelSettings(tensor_size=2))
    check_batch_size(config, num_ranks=8)  # 8 sequences: 4 ranks of 2
    message = r"over 8 ranks in micro-batches .*; counted are data-parallel ranks, 16 ranks by"
    with pytest.raises(InputError, match=message):
        check_batch_size(config, num_ranks=16)


def test_auto_layout_is_single_alone_and_fsdp_in_company():
    assert ParallelSettings().resolved_kind(1) == "single"
    assert ParallelSettings().resolved_kind(2) == "fsdp"


@pytest.mark.parametrize(
    ("rank", "on_all_ranks", "printed"),
    [
        (0, True, "error: the cause\n"),
        (1, True, ""),
        (0, False, "error: rank 0: the cause\n"),
        (1, False, "error: rank 1: the cause\n"),
    ],
)
def test_error_is_printed_once_by_a_rank_that_met_it(rank, on_all_ranks, printed, capsys):
    error = InputError("the cause", on_all_ranks=on_all_ranks)
    assert print_error(error, rank=rank, num_ranks=2) == 2
    assert capsys.readouterr().err == printed


def test_rank_that_is_alone_is_not_named(capsys):
    assert print_error(TrainingError("the cause")) == 3
    assert capsys.readouterr().err == "error: the cause\n"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_launchers_signal_is_seen_by_a_rank_that_looks_later(number):
    before = signal.getsignal(number)
    with StopRequest(RawValue(c_bool, False)).listening() as launcher:
        rank = StopRequest(launcher.flag)
        assert not rank.requested
        os.kill(os.getpid(), number)
        assert rank.requested
    assert signal.getsignal(number) is before


def test_what_a_killed_start_was_writing_goes_with_the_next(tmp_path, shards):
    half_written = tmp_path / "small" / ".summary.json.elsewhere-1.tmp"
    half_written.parent.mkdir()
    half_written.write_text("{")
    with taken(tmp_path / "small", small_run(tmp_path, shards), "data", ALONE):
        assert not half_written.exists()


def test_a_run_notes_where_its_data_is_and_the_ids_around_a_document(tmp_path, shards, monkeypatch):
    monkeypatch.chdir(shards.parent)
    config = small_run(tmp_path, Path(shards.name))
    with taken(tmp_path / "small", config, "data", ALONE):
        noted = read_provenance(tmp_path / "small")["data"]
    ids = {"bos_id": None, "eos_id": 0, "tokenizer_sha256": None}
    assert noted == {"folder": str(shards.resolve()), **ids}


def test_start_on_a_full_disk_ends_in_one_line(tmp_path, shards, monkeypatch):
    config = small_run(tmp_path, shards)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "outputs/small/config.yaml")

    monkeypatch.setattr(launch, "write_provenance", full)
    line = r"^outputs/small/config.yaml cannot be written \(No space left on device\); make room"
    with (
        pytest.raises(TrainingError, match=line),
        taken(tmp_path / "small", config, "data", ALONE),
    ):
        pass


@pytest.mark.parametrize(
    ("environment", "processes", "threads"),
    [({}, 2, 4), ({}, 16, 1), ({"OMP_NUM_THREADS": "3"}, 2, 3), ({"OMP_NUM_THREADS": "5,2"}, 2, 5)],
)
def test_threads_are_those_asked_for_or_a_share_of_the_jobs_cores(
    environment, processes, threads, monkeypatch
):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 128)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert threads_per_process(processes) == threads
