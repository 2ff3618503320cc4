import pytest

from gns_pretrain.distributed.mesh import ParallelSettings, Place, shard_group_size
from gns_pretrain.errors import InputError
from gns_pretrain.place import place_from
from gns_pretrain.slurm import first_host


def test_nothing_set_means_nobody_has_started_ranks():
    assert place_from({}) is None
    assert place_from({"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_batch_shell_of_a_job_is_no_rank_of_it():
    batch_shell = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert place_from(batch_shell) is None


def test_torchrun_variables_give_the_place():
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert place_from(environment) == Place(5, 8, 1, 4, "env://")


def test_torchrun_inside_slurm_counts_as_torchrun():
    environment = {"RANK": "0", "WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "4"}
    assert place_from(environment) == Place(0, 2, 0, 2, "env://")


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
    assert place_from(srun()) == Place(9, 16, 1, 8, "tcp://gpu07:24321")


def test_srun_meeting_point_can_be_set():
    place = place_from(srun(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"))
    assert place is not None
    assert place.rendezvous == "tcp://127.0.0.1:29500"


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


def test_auto_layout_is_single_alone_and_fsdp_in_company():
    assert ParallelSettings().resolved_kind(1) == "single"
    assert ParallelSettings().resolved_kind(2) == "fsdp"
