"""Runs whose checkpoints lie in an S3 bucket, of a server that moto runs on this machine."""

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gns_pretrain.system.remote import folder_at
from gns_pretrain.training.checkpoint_reader import checkpoint_folders
from tests.end_to_end import commands
from tests.end_to_end.test_resume import die_while_hashing_the_second_checkpoint, lines

pytest.importorskip("s3fs", reason="needs the extra: pip install 'gns-pretrain[remote]'")
server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a bucket, which the commands reach by the usual variables."""
    here = server.ThreadedMotoServer("127.0.0.1", port=0)
    here.start()
    host, port = here.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        url = f"s3://bucket-{secrets.token_hex(4)}"
        folder_at(url, "bucket").mkdir()
        yield url
    here.stop()


def start(words: list[str], folder: Path, sabotage=None) -> int:
    """Run the command with this process's variables, which the fork server does not have."""
    return commands.run(words, folder / "log", Environment(sabotage))


class Environment:
    """Sabotage that first gives the command the variables of S3 that this process has now."""

    def __init__(self, then) -> None:
        self.variables = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
        self.then = then

    def __call__(self) -> None:
        os.environ.update(self.variables)
        if self.then:
            self.then()


def test_killed_while_it_uploads_it_ends_with_the_same_lines(bucket, tmp_path, shards):
    (whole := tmp_path / "whole").mkdir()
    assert commands.run(commands.arguments(whole, shards), whole / "log") == 0
    words = commands.arguments(tmp_path, shards, f"checkpoint.directory={bucket}/one")
    killed = start(words, tmp_path, die_while_hashing_the_second_checkpoint)
    assert killed == -signal.SIGKILL
    names = [path.name for path in checkpoint_folders(folder_at(bucket, "") / "one/small")]
    assert names == ["step_00000005"]
    assert start(words, tmp_path) == 0
    assert "resumed from step 5" in (tmp_path / "log").read_text()
    assert lines(tmp_path) == lines(whole)


def test_two_ranks_share_the_bucket_and_one_resumes(bucket, tmp_path, shards):
    words = commands.arguments(tmp_path, shards, f"checkpoint.directory={bucket}/two", steps=7)
    two = [*words, "launch.nproc_per_node=2", "parallel=fsdp"]
    assert start(two, tmp_path) == 0
    folder = folder_at(bucket, "") / "two/small/step_00000007"
    assert len(list(folder.glob("*.distcp"))) == 2
    (tmp_path / "small" / "summary.json").unlink()
    assert start(words, tmp_path) == 0
    assert "resumed from step 7" in (tmp_path / "log").read_text()
