"""How ranks meet and part."""

import gc
import socket
import weakref
from datetime import timedelta

import pytest
import torch

from gns_pretrain.errors import InputError
from gns_pretrain.launch.crash_report import is_consequence
from gns_pretrain.parallel import mesh
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, joined, pick_device


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_group_that_was_left_ends_no_threads_under_the_interpreters_lock(kind):
    # torch 2.13 waits for them in the group's destructor, and they may want that lock: a deadlock.
    with joined(RankInfo(), ParallelSettings(kind=kind), torch.device("cpu")) as world:
        assert world.mesh is not None
        group = weakref.ref(world.mesh.get_group())
    del world
    gc.collect()
    assert group() is not None


def test_a_rank_says_for_whom_it_waits_and_what_to_set_when_nobody_comes(monkeypatch, capsys):
    monkeypatch.setattr(mesh, "NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(mesh, "note_process_group", lambda num_ranks: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    place = RankInfo(0, 4, 0, 4, f"tcp://{address}")
    with pytest.raises(RuntimeError, match="set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME") as info:
        mesh.start_process_group(place, torch.device("cpu"), timedelta(seconds=1))
    assert is_consequence(info.value)  # one line, and no traceback
    assert f"the 3 others at {address}" in str(info.value)
    assert f"rank 0 waits for the 3 others at {address}, 1 s at most" in capsys.readouterr().out


def test_a_slurm_task_that_sees_one_gpu_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    assert pick_device("auto", 0) == torch.device("cuda", 0)
    with pytest.raises(InputError, match=r"rank 3 finds 1; .*--gpus-per-task=1"):
        pick_device("auto", 3)
    # Ranks that this command starts in a job's batch shell, task 0, would share the GPU.
    monkeypatch.setenv("SLURM_LOCALID", "0")
    with pytest.raises(InputError, match="rank 3 finds 1"):
        pick_device("auto", 3)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert pick_device("auto", 3) == torch.device("cuda", 0)
