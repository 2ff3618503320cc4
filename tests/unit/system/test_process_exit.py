"""How a rank ends while a gloo thread still drops a tensor: its code, its output, its callbacks."""

import atexit
import ctypes
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from gns_pretrain.noise_scale.host_spectra import host_threads
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, joined
from gns_pretrain.system import processes
from gns_pretrain.system.processes import note_process_group, rank_process

ROOT = Path(__file__).parents[3]
ENDS: dict[str, tuple[BaseException | None, int]] = {
    "returns": (None, 0),
    "finished": (SystemExit(0), 0),
    "no code": (SystemExit(), 0),
    "bad input": (SystemExit(2), 2),
    "training": (SystemExit(3), 3),
    "stopped": (SystemExit(75), 75),
    "text": (SystemExit("the cause"), 1),
    "error": (ValueError("the cause"), 1),
    "interrupted": (KeyboardInterrupt("the cause"), 130),
}
FULL_DISK = "full disk"
ALONE = "alone"
COMPUTING, COMPUTING_ALONE = "computing", "computing alone"
AT_EXIT = ["callback", "printed", "printed by C", "thread"]


class SlowToDrop:
    """Goes with a tensor; on a gloo thread it asks for the GIL until the process ends."""

    def __init__(self, dropped_on_main: SimpleQueue[bool]) -> None:
        self.dropped_on_main = dropped_on_main

    def __del__(self) -> None:
        on_main = threading.current_thread() is threading.main_thread()
        self.dropped_on_main.put(on_main)
        while not on_main:
            time.sleep(0.001)


def keep_a_gloo_thread_busy(group: Any) -> None:
    """Reduce tensors until the gloo thread is the last to hold one."""
    dropped_on_main: SimpleQueue[bool] = SimpleQueue()
    while True:
        tensor = torch.ones(1000)
        tensor.companion = SlowToDrop(dropped_on_main)
        group.allreduce([tensor])
        del tensor
        if not dropped_on_main.get():
            return


def keep_the_host_threads_busy(*, for_ever: bool) -> None:
    """Let each return from C++ again and again, and have further calls wait."""
    threads = host_threads()
    begun: SimpleQueue[bool] = SimpleQueue()

    def compute() -> None:
        begun.put(True)
        times = itertools.count() if for_ever else range(200)
        for _ in times:
            torch.linalg.eigvalsh(torch.eye(100))

    for _ in threads.threads:
        threads.start(compute)
    for _ in threads.threads:
        begun.get()
    threads.start(lambda: print("begun too late"))


class Marker:
    """Tells that the interpreter was finalized."""

    def __del__(self) -> None:
        os.write(2, b"finalized\n")


def end_as(way: str) -> None:
    """A program's own part, in the process that ends."""
    atexit.register(print, "callback")
    threading.Thread(target=lambda: (threading.main_thread().join(), print("thread"))).start()
    print("printed")
    ctypes.CDLL(None).puts(b"printed by C")
    if way in (COMPUTING, COMPUTING_ALONE):
        keep_the_host_threads_busy(for_ever=way == COMPUTING)
    if way in (ALONE, COMPUTING, COMPUTING_ALONE):
        sys.exit(75)
    with joined(RankInfo(), ParallelSettings(kind="fsdp"), torch.device("cpu")) as world:
        assert world.mesh is not None
        keep_a_gloo_thread_busy(world.mesh.get_group())
    error = ENDS[way][0] if way in ENDS else None
    if error is not None:
        raise error


def fork_ranks(folder: Path) -> None:
    """Fork a process for every way to end, which returns into the program's end; write codes."""
    children = {}
    for way in (*ENDS, FULL_DISK, ALONE, COMPUTING, COMPUTING_ALONE):
        pid = os.fork()
        if pid == 0:
            output = Path("/dev/full") if way == FULL_DISK else folder / f"{way}.out"
            for stream, path in ((1, output), (2, folder / f"{way}.err")):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
            sys.modules["marker"] = Marker()
            with nullcontext() if way == COMPUTING_ALONE else rank_process():
                end_as(way)
            return
        children[way] = pid
    codes = {way: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for way, pid in children.items()}
    (folder / "codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """Where each process has written, and its exit code; one import of torch serves all."""
    folder = tmp_path_factory.mktemp("ends")
    program = (
        "from pathlib import Path\n"
        "from tests.unit.system.test_process_exit import fork_ranks\n"
        f"fork_ranks(Path({str(folder)!r}))"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=buffered, check=True)
    return folder, json.loads((folder / "codes.json").read_text())


@pytest.mark.parametrize("way", ENDS)
def test_rank_leaves_with_its_code_after_all_its_output_and_without_finalization(way, ended):
    folder, codes = ended
    errors = (folder / f"{way}.err").read_text()
    assert codes[way] == ENDS[way][1], errors
    assert sorted((folder / f"{way}.out").read_text().splitlines()) == AT_EXIT
    assert ("the cause" in errors) == ("the cause" in str(ENDS[way][0]))
    assert ("Traceback" in errors) == (way in ("error", "interrupted"))
    assert "finalized" not in errors


def test_output_that_cannot_be_written_is_no_success(ended):
    folder, codes = ended
    assert codes[FULL_DISK] == 1
    assert "No space left on device" in (folder / f"{FULL_DISK}.err").read_text()


def test_process_that_joined_nobody_is_finalized(ended):
    folder, codes = ended
    assert codes[ALONE] == 75
    assert sorted((folder / f"{ALONE}.out").read_text().splitlines()) == AT_EXIT
    assert (folder / f"{ALONE}.err").read_text() == "finalized\n"


@pytest.mark.parametrize("way", [COMPUTING, COMPUTING_ALONE])
def test_process_whose_host_threads_compute_leaves_with_its_code(way, ended):
    folder, codes = ended
    errors = (folder / f"{way}.err").read_text()
    assert codes[way] == 75, errors
    assert sorted((folder / f"{way}.out").read_text().splitlines()) == AT_EXIT
    assert errors == ("finalized\n" if way == COMPUTING_ALONE else "")


def test_program_of_a_rank_that_would_be_finalized_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "_is_guarded", False)  # other tests call commands in here
    with pytest.raises(AssertionError, match=r"must run inside rank_process\(\)"):
        note_process_group(num_ranks=2)
