"""A mistake on the command line ends in one line and exit code 2, and nothing is written."""

import pytest

from tests.end_to_end import commands


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimizer.lrr=1"], ["optimizer.lrr: there is no such setting", "optimizer.lr?"]),
        (["--lr=1"], ["--lr=1: there is no such option", "without dashes"]),
        (["+optimizer.lrr=1"], ["optimizer.lrr: there is no such setting"]),
        (["token_budget=many"], ["token_budget=many", "a whole number"]),
        (["token_budget=1.5"], ["token_budget=1.5", "1_000_000, 1e6, 1M or 3.2B"]),
        (["model=huge"], ["model=huge: there is no such choice", "llama3_160m"]),
        (["optimizer.lr"], ["optimizer.lr", "not of the form setting=value"]),
        (["optimizer.lr=1e-3,2e-3"], ["optimizer.lr=1e-3,2e-3", "add --multirun"]),
        (
            ["+sweep=tune_signum", "optimizer.lr=1e-3,2e-3", "optimizer.momentun=0.9"],
            ["optimizer.momentun: there is no such setting", "optimizer.momentum?"],
        ),
        (["optimizer.lr=-1"], ["optimizer.lr=-1", "must be positive"]),
        (
            ["optimizer=custom", "optimizer.class_path=torch.optim.Muon"],
            ["torch.optim.Muon", "use optimizer.parameters=block_matrices"],
        ),
        (["batch_size.initial=9"], ["batch_size.initial=9", "multiple of 2"]),
        (
            ["batch_size.initial=8", "launch.nproc_per_node=8"],
            ["batch_size.initial=8", "8 ranks", "micro_batch_size=2", "multiple of 16"],
        ),
        (["parallel=single", "launch.nproc_per_node=2"], ["parallel.kind=single", "parallel=fsdp"]),
        (
            ["parallel.tensor_size=2", "launch.nproc_per_node=2"],
            ["parallel.tensor_size=2", "model.num_heads=3"],
        ),
        (["model.dim=19"], ["model.dim=19", "model.num_heads=3"]),
        (["model.num_kv_heads=2"], ["model.num_kv_heads=2"]),
        (["model.vocab_size=60"], ["model.vocab_size=60", "61"]),
        (["data.sequence_length=5000"], ["token_budget=2560", "data.sequence_length=5000"]),
        (
            ["data.sequence_length=5000", "token_budget=1000000"],
            ["data.sequence_length=5000", "split"],
        ),
        (["data.path=/nowhere"], ["data.path=/nowhere"]),
        (["evaluation.num_sequences=1000"], ["evaluation.num_sequences=1000"]),
        (["data=shards", "data.path=???"], ["data.path"]),
        (["launch.device=gpu"], ["launch.device=gpu", "auto, cpu, cuda"]),
        (["run_name=a/b"], ["run_name='a/b'"]),
        (
            ["output_directory=/dev/null/a"],
            ["output_directory: /dev/null/a/small cannot be written"],
        ),
    ],
)
def test_mistake_ends_in_one_line_that_names_it(words, told, tmp_path, shards):
    folder = tmp_path / "outputs"
    code = commands.run(commands.arguments(folder, shards, *words), tmp_path / "log")
    log = (tmp_path / "log").read_text()
    assert code == 2, log
    assert log.startswith("error: ")
    assert log.count("\n") == 1, log
    for words_of_the_message in told:
        assert words_of_the_message in log
    assert not folder.exists()


def test_other_settings_under_the_same_name_are_refused(tmp_path, shards):
    words = commands.arguments(tmp_path, shards, steps=2)
    assert commands.run(words, tmp_path / "log") == 0
    before = {p: p.read_bytes() for p in (tmp_path / "small").rglob("*") if p.is_file()}
    assert commands.run([*words, "model.ffn_dim=32"], tmp_path / "log") == 2
    log = (tmp_path / "log").read_text()
    assert "model.ffn_dim was 26 and is now 32; use another run_name" in log
    assert {p: p.read_bytes() for p in (tmp_path / "small").rglob("*") if p.is_file()} == before
