"""The examples run as they stand, and the pages' loop is theirs, in as few lines as they say."""

import contextlib
import difflib
import importlib.util
import io
import os
import re
import runpy

import pytest
import torch
from torch.distributed import TCPStore

from gns_pretrain.parallel.mesh import RankInfo
from tests.distributed.harness import run_ranks
from tests.end_to_end.commands import ROOT

EXAMPLES = ROOT / "examples"
NUM_RANKS = 2
UNDER_TORCHRUN = ["fsdp2_llama", "ddp_gpt2"]


def output_of(name: str) -> str:
    """What an example prints; it runs in this process, which has imported torch."""
    output = io.StringIO()
    with torch.random.fork_rng(), contextlib.redirect_stdout(output):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return output.getvalue()


def outputs_on_rank(place: RankInfo, ports: list[int]) -> dict[str, str]:
    """The same of several examples on one of the ranks that torchrun would start."""
    # torchrun's own variables: the store of its agent is here that of the test.
    os.environ |= {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    outputs = {}
    for name, port in zip(UNDER_TORCHRUN, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        outputs[name] = output_of(name)
    return outputs


@pytest.fixture(scope="module")
def of_first_rank(tmp_path_factory) -> dict[str, str]:
    stores = [
        TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in UNDER_TORCHRUN
    ]
    ports = [store.port for store in stores]
    return run_ranks(NUM_RANKS, outputs_on_rank, tmp_path_factory.mktemp("ranks"), ports)[0]


def code_lines(name: str) -> list[str]:
    """Lines without indentation, blank ones and the docstring."""
    lines = [line.strip() for line in (EXAMPLES / f"{name}.py").read_text().splitlines()]
    return [
        line for line in lines if line and not line.startswith('"""The') and "may be" not in line
    ]


def noise_scales(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"noise scale \D*([\d.]+)", output)]


@pytest.mark.parametrize(
    ("name", "allowed"), [("loop_with_meter", 6), ("loop_with_adaptive_batch", 12)]
)
def test_loop_gains_it_in_few_lines(name, allowed):
    changes = difflib.ndiff(code_lines("plain_loop"), code_lines(name))
    added = [change for change in changes if change.startswith("+ ")]
    assert len(added) <= allowed, added


@pytest.mark.parametrize(
    ("page", "block", "name"),
    [
        ("README.md", 0, "loop_with_meter"),
        ("docs/howto/own_loop.md", 0, "loop_with_meter"),
        ("docs/howto/own_loop.md", 1, "loop_with_adaptive_batch"),
    ],
)
def test_page_shows_the_loop(page, block, name):
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = [(line[0], line[1:].strip()) for line in diffs[block].splitlines() if line]
    for file, sign in (("plain_loop", "-"), (name, "+")):
        rest = iter(code_lines(file))
        for mark, line in lines:
            # In this order, perhaps with others between them; a name more is imported later.
            assert mark not in (" ", sign) or line in rest, f"{file} has no {line!r} there"


def test_measuring_changes_nothing_and_the_adaptive_batch_grows():
    plain, measured = output_of("plain_loop"), output_of("loop_with_meter")
    assert plain.splitlines()[-1] == measured.splitlines()[-1]
    assert len(noise_scales(measured)) == 11  # at step 1 and every ten of 100
    last_batch = int(output_of("loop_with_adaptive_batch").split()[-1])
    assert last_batch > 32


def test_convnet_with_muon():
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output_of("convnet_muon"))]
    assert losses[-1] < 0.7 * losses[0]


def test_gpt2_under_ddp(of_first_rank):
    scales = r"euclidean [\d.]+, manhattan [\d.]+, nuclear [\d.]+"
    assert len(re.findall(scales, of_first_rank["ddp_gpt2"])) == 3


def test_llama_under_fsdp2_with_an_adaptive_batch(of_first_rank):
    output = of_first_rank["fsdp2_llama"]
    assert "batch 16 -> " in output
    assert float(re.findall(r"loss ([\d.]+)", output)[-1]) < 2.5  # from ln 64 = 4.2


def test_hugging_face_callback():
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("transformers' Trainer needs accelerate, which is not installed")
    assert output_of("hf_trainer_callback").count("noise_scale/manhattan") == 3


def test_lightning_callback():
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed, and not part of the dev extra: it is large")
    assert "noise_scale/nuclear" in output_of("lightning_callback")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < 100
