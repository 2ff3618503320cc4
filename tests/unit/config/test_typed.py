"""What is typed after `gns-pretrain train` gives settings, or one line that says what to mend."""

import importlib
import pkgutil
import re
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import gns_pretrain
from gns_pretrain.config.checks import state_bytes
from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.hydra_errors import as_input_error
from gns_pretrain.config.register import CONFIG_FOLDER, register_configs
from gns_pretrain.config.schema import Config
from gns_pretrain.config.typed import as_typed
from gns_pretrain.data.batches import inputs_and_targets
from gns_pretrain.errors import InputError
from gns_pretrain.fields import Bound, Settings
from gns_pretrain.launch.train import check_run
from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.model.llama import Llama
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.runs.identity import flatten
from gns_pretrain.system import processes
from gns_pretrain.training.step import accumulate_gradients
from tests.settings import VOCABULARY

BUDGET_SECONDS = 10.0  # of the fuzzer
BEGAN: dict[str, float] = {}


@pytest.fixture(scope="module")
def base(shards, tmp_path_factory) -> list[str]:
    register_configs()
    return [
        "data=shards",
        f"data.path={shards}",
        "data.sequence_length=16",
        f"output_directory={tmp_path_factory.mktemp('typed') / 'outputs'}",
        "run_name=typed",
        "evaluation.num_sequences=2",
        "batch_size.initial=8",
        "micro_batch_size=2",
        "token_budget=2560",
    ]


def checked(words: list[str]) -> Config:
    """What the command does before it trains."""
    words = list(map(as_typed, words))
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            node = compose("train", words)
        config = settings_from(node, words)
        check_run(config, None)
    except InputError:
        raise
    except Exception as error:
        raise as_input_error(error, words) from error
    return config


def test_first_batch_by_rule_of_scale_is_a_number_in_settings_and_run_name(base):
    words = [*base, "token_budget=2.5B", "batch_size.initial=auto", "data.sequence_length=2048"]
    words = [as_typed(word) for word in words if not word.startswith("run_name")]
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = settings_from(compose("train", words), words)
    assert config.batch_size.initial == 128
    assert "-initial128" in config.run_name
    assert as_typed("batch_size.initial=auto,16") == "batch_size.initial=${auto:},16"


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (
            "batch_size.initial=auto",
            "auto is a law of runs of 2.2 to 142 billion tokens, and token",
        ),
        (
            "optimizer.weight_decay_timescale=auto",
            "20 to 1280 tokens a parameter, and this one has",
        ),
        ("batch_size=64", "batch_size=64: batch_size is a group of settings; choose one of adapt"),
        ("optimizer=[1]", r"optimizer=\[1\]: optimizer is a group of settings; choose one of ada"),
        ("data=null", "data is a group of settings"),
        ("metrics=true", "metrics is a group of settings"),
        ("=5", "=5: Hydra cannot compose these settings"),
        ("hydra=5", "hydra is a group of settings"),
        ("seed=${oc.env:NOT_SET_ANYWHERE}", "'NOT_SET_ANYWHERE' not found"),
        ("token_budget=1e24", "at most 9223372036854775807"),
        ("token_budget=1.5", "is a whole number of tokens, such as 1_000_000, 1e6, 1M or 3.2B"),
        ("token_budget=1e999999", "is a whole number of tokens"),
        ("seed=1e3", "is a whole number, written without a point or exponent"),
        ("batch_size=64", "batch_size.initial=N is the number of sequences in a step"),
        ("model=1", r"model=1: .* choose one of demo, .*; set what is in it by model.NAME=..."),
        ("data=/a/b", "data=/a/b: there is no such choice; .* data=shards data.path=FOLDER"),
        ("data=c4", "data=c4: .* data=shards data.path=FOLDER .* gns-pretrain prepare-data wrote"),
        ("lr=1e-3", "lr: there is no such setting; did you mean optimizer.lr?"),
        ("theta=1", "did you mean batch_size.theta?"),
        ("steps=100", "a run's length is token_budget, in tokens: steps x batch_size.initial x"),
        ("max_steps=100", "a run's length is token_budget"),
        ("wandb=true", "metrics=wandb shows a run there"),
        ("optimizer=schema_adamw", "optimizer=schema_adamw: there is no such choice; .* signum"),
        ("dry_run_steps=2", "dry_run_steps=2 are those of a dry run; set dry_run=true too"),
        ("token_budget=1000000000000000000000000", "at most 9223372036854775807"),
        ("metrics.log_every=9223372036854775808", "at most 9223372036854775807"),
        ("seed=-9223372036854775809", "at most 9223372036854775807"),
        ("launch.threads=1000000", "launch.threads=1000000 must be at most 4096"),
        ("launch.nproc_per_node=1000000", "must be at most 4096"),
        ("parallel.timeout_seconds=99999999999", "must be at most 31622400"),
        ("output_directory=", "output_directory= is not a path; name one"),
        ("data.path=", "data.path= is not a path; name one"),
        ("data.path=~nobody-has-this-name/x", "this home directory is not known; write the path"),
        ("data.path=null", "data.path=null is not a folder"),
        ("data.stage_to=/proc/nope", "/proc/nope cannot be written"),
        (f"run_name={'a' * 300}", r"run_name=a{40}\.\.\. has 300 letters"),
        ("model.dim=1000000000", "needs at least [0-9,]+ bytes on 1 rank, but the machine has"),
        ("model.num_layers=100000000", "needs at least [0-9,]+ bytes on 1 rank"),
        ("model.vocab_size=9999999999999", "needs at least [0-9,]+ bytes on 1 rank"),
        (
            "micro_batch_size=99999999999 batch_size.initial=99999999999 "
            "token_budget=999999999999999",
            "micro_batch_size=99999999999 x data.sequence_length=16 needs at least",
        ),
        (
            "batch_size=adaptive noise_scale=manhattan micro_batch_size=999999999999",
            "use batch_size.initial=7999999999992, or micro_batch_size=1",
        ),
    ],
)
def test_a_refusal_names_what_was_typed_in_one_line_and_leaves_no_file(typed, line, base):
    with pytest.raises(InputError, match=line) as refusal:
        checked([*base, *typed.split(" ")])
    assert "\n" not in str(refusal.value)
    folder = next(word for word in base if word.startswith("output_directory=")).partition("=")[2]
    assert not Path(folder).exists()


@pytest.mark.parametrize("name", ["1e5", "1_000", "true", "null", "2024-01-01"])
def test_text_stays_as_it_was_typed(name, base):
    tags = f"metrics.wandb.tags=[{name},b]"
    config = checked([*base, f"run_name={name}", tags, f"metrics.wandb.job_type={name}"])
    assert config.run_name == name
    assert config.metrics.wandb.tags == [name, "b"]
    assert config.metrics.wandb.job_type == (None if name == "null" else name)


@pytest.mark.parametrize(
    ("typed", "word"),
    [
        ("run_name=1e5,2_0,x", 'run_name="1e5","2_0",x'),  # a sweep
        *((f"run_name={text}", f'run_name="{text}"') for text in ("12345e7", "False", "nan", "1.")),
        *((f"run_name={text}",) * 2 for text in ("'1e5'", "0x10", "a1e5", "1e", "")),
        ("run_name=choice(1e5,2)", "run_name=choice(1e5,2)"),
        ("run_name=x-${seed}", "run_name=x-${seed}"),
        ("data.path=~/x-${seed},~/y", 'data.path="~/x-${seed}","~/y"'),
        ("+table=1", '+table="1"'),
        ("optimizer.class_path=1e5", 'optimizer.class_path="1e5"'),
        ("optimizer.lr=1e-3", "optimizer.lr=1e-3"),
        ("optimizer.kwargs={a:1e5}", "optimizer.kwargs={a:1e5}"),
        ("seed=1,2", "seed=1,2"),
        ("~data", "~data"),
        ("init.from=~/run", 'init.from="~/run"'),
        ("init.from=null", "init.from=null"),
        ("init.from=runs/a=1", 'init.from="runs/a=1"'),
        ("--config-dir=~/c", "--config-dir=/home/me/c"),
        *((f"token_budget={text}", "token_budget=1000000") for text in ("1e6", "1M", "1_000_000")),
        ("token_budget=3.2B,1e3", "token_budget=3200000000,1000"),
        ("batch_size.stage_tokens=[300k,0.5m]", "batch_size.stage_tokens=[300000,500000]"),
        *((f"token_budget={text}",) * 2 for text in ("1.5", "0.1k5", "M", "1e999", "1e-3", "-1M")),
        ("seed=1M", "seed=1M"),
        # As W&B's agents write a setting.
        ("--optimizer.lr=1e-3", "optimizer.lr=1e-3"),
        ("--token_budget=1M", "token_budget=1000000"),
        ("--cfg=job", "--cfg=job"),
    ],
)
def test_text_is_quoted_and_tokens_are_counted(typed, word, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert as_typed(typed) == word


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_tilde_is_the_home_directory_in_every_path_of_a_run(base, shards, monkeypatch, quote):
    monkeypatch.setenv("HOME", str(shards.parent))
    names = ("data.path", "data.stage_to", "output_directory", "launch.compile_cache")
    words = [f"{name}={quote}~/{shards.name}{quote}" for name in names]
    config = checked([*base, *words])
    paths = [config.data.path, config.data.stage_to, config.output_directory]
    assert [*paths, config.launch.compile_cache] == [str(shards)] * 4
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        node = compose("train", list(map(as_typed, words)), return_hydra_config=True)
    assert node.hydra.sweep.dir == f"{shards}/logs"  # which Hydra itself makes


def test_a_path_of_any_settings_knows_the_home_directory():
    """Path is a path's type; text is a path where it says so."""
    paths = set()
    for module in pkgutil.walk_packages(gns_pretrain.__path__, "gns_pretrain."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    kinds = [Settings]
    for kind in kinds:  # which grows
        kinds += kind.__subclasses__()
        for name, hint in get_type_hints(kind, include_extras=True).items():
            notes = getattr(hint, "__metadata__", ())
            marked = any(isinstance(note, Bound) and note.is_path for note in notes)
            plain = get_args(hint)[0] if notes else hint
            assert marked or not {plain, *get_args(plain)} & {Path}, f"{kind.__name__}.{name}"
            if marked:
                paths.add(f"{kind.__name__}.{name}")
    assert paths >= {
        *("Config.output_directory", "LaunchSettings.compile_cache", "DataSettings.path"),
        *("DataSettings.stage_to", "PrepareSettings.out", "PrepareSettings.train"),
        *("PrepareSettings.validation", "PrepareSettings.tokenizer"),
        *("InitSettings.source", "MeasurementRequest.checkpoint", "MeasurementRequest.data"),
    }


def test_a_largest_micro_batch_beyond_all_memory_takes_no_time_and_no_memory(base):
    words = ["batch_size=adaptive", "noise_scale=manhattan", "batch_size.initial=16"]
    checked([*base, *words, "batch_size.micro_batch_max=999999999999"])


def test_memory_counts_every_rank_of_a_machine_and_its_share(base, monkeypatch):
    words = [*base, "model.dim=64", "launch.nproc_per_node=2", "launch.device=cpu"]
    monkeypatch.setattr("gns_pretrain.config.checks.machine_memory", lambda: 10**12)
    checked(words)
    monkeypatch.setattr("gns_pretrain.config.checks.machine_memory", lambda: 10**6)
    with pytest.raises(InputError, match="on 2 ranks, but the machine has 1,000,000"):
        checked(words)


def test_memory_counts_the_copy_of_an_asynchronous_save(base, monkeypatch):
    def memory(num_bytes: int) -> None:
        monkeypatch.setattr("gns_pretrain.config.checks.machine_memory", lambda: num_bytes)

    def refused(pattern: str) -> list[int]:
        with pytest.raises(InputError) as refusal:
            checked(words)
        found = re.search(pattern, str(refusal.value))
        assert found is not None
        return [int(number.replace(",", "")) for number in found.groups()]

    words = [*base, "launch.nproc_per_node=2", "launch.device=cpu"]
    memory(0)
    parameters, needed = refused("with ([0-9,]+) parameters.*at least ([0-9,]+) bytes")
    memory(needed)
    (copies,) = refused("checkpoint.asynchronous=true copies ([0-9,]+) bytes")
    assert 12 * parameters - 24 < copies <= 12 * parameters  # AdamW's, over the shards
    checked([*words, "checkpoint.asynchronous=false"])
    memory(needed + copies)
    checked(words)


@pytest.mark.parametrize(
    ("words", "of_matrix", "of_other"),
    [
        (["optimizer=adamw"], 8, 8),
        (["optimizer=muon"], 4, 8),
        (["optimizer=specsgd"], 0, 8),
        (["optimizer=signum"], 4, 4),
        (["optimizer=signsgd"], 0, 0),
        (["optimizer=adago"], 4, 8),
        (["optimizer=adagrad"], 4, 4),
        (["optimizer=adagrad_norm"], 0, 0),
        (["optimizer=subset_norm"], 0, 8),  # at least: its state has rows of a weight alone
        (["optimizer=custom", "optimizer.class_path=torch.optim.NAdam"], 8, 8),
        # Of one number for a row and one for a column, nothing has the weight's own shape.
        (["optimizer=custom", "optimizer.class_path=torch.optim.Adafactor"], 0, 0),
    ],
)
def test_an_optimizers_state_is_counted_by_a_step_over_a_tiny_model(
    words, of_matrix, of_other, base
):
    before = torch.get_rng_state()
    config = checked([*base, *words])
    assert state_bytes(config.optimizer, config.averaging) == (of_matrix, of_other)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_that_is_counted_is_held_in_a_measured_step(base, monkeypatch):
    measured = ["noise_scale=all", "noise_scale.estimates=[plug_in,cross_fitted]"]
    measured += ["noise_scale.every_steps=10", "optimizer=adamw"]
    shape = {"dim": 48, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 80}
    words = [*base, *measured, *(f"model.{name}={size}" for name, size in shape.items())]
    config = checked(words)
    model = Llama(LlamaConfig("held", **shape, vocab_size=VOCABULARY))
    meter = NoiseMeter(model, config.noise_scale)
    optimizer = config.optimizer.build(model)
    batch = list(torch.randint(VOCABULARY, (2, 1, 9)))
    for _ in range(2):
        with meter.measure():
            accumulate_gradients(model, map(inputs_and_targets, batch), accumulation=2, meter=meter)
        optimizer.step()
    tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    tensors += [*meter.tap.squares, *meter.tap.signed_sums, *meter.tap.grams.values()]
    held = sum(tensor.nbytes for tensor in tensors)

    monkeypatch.setattr("gns_pretrain.config.checks.machine_memory", lambda: 0)
    with pytest.raises(InputError, match="optimizer=adamw") as refusal:
        checked(words)
    needed = int(re.search(r"at least ([0-9,]+) bytes", str(refusal.value))[1].replace(",", ""))
    assert 0.99 * held < needed <= held
    # A run that is over before it measures beside the optimizer's state holds less.
    with pytest.raises(InputError) as refusal:
        checked([*words, "noise_scale.every_steps=100"])
    less = int(re.search(r"at least ([0-9,]+) bytes", str(refusal.value))[1].replace(",", ""))
    sums = sum(tensor.nbytes for tensor in [*meter.tap.squares, *meter.tap.signed_sums])
    assert less < needed - sums


def test_memory_of_a_container_is_its_own(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    limit.write_text("4096\n")
    monkeypatch.setattr(processes, "CONTAINER_MEMORY", limit)
    assert processes.machine_memory() == 4096
    limit.write_text("max\n")
    assert processes.machine_memory() > 4096


def known_settings() -> list[str]:
    """Every group and every dotted setting of the default run."""
    register_configs()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        content = OmegaConf.to_container(compose("train"))
    groups = [path.name for path in CONFIG_FOLDER.iterdir() if path.is_dir()]
    return sorted({*flatten(content), *content, *groups})


VALUES = [
    *("", "null", "true", "0", "-1", "1", "3", "64", "1e24", "1e-400", "nan", "inf", "-inf", ".5"),
    *("999999999999", "9223372036854775808", "1_0", "0x10", "abc", "???", "~", ".", "..", "/"),
    *("[]", "[1]", "[[1]]", "[a,b]", "{}", "{a:1}", "{a:{b:1}}", "[null]", "a,b", "range(3)"),
    *(
        "${seed}",
        "${nothing}",
        "${oc.env:NOT_SET_ANYWHERE}",
        "${oc.env:HOME}",
        "$",
        "a=b",
        "'",
        '"',
    ),
    *("/dev/null", "/proc/nope", "é", "\u202e", "adaptive", "muon", "fsdp", "a" * 300, "[" * 50),
]


@hypothesis_settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "", "", "+", "++", "~"]),
            st.deferred(lambda: st.sampled_from(known_settings())),
            st.sampled_from(VALUES),
        ),
        min_size=1,
        max_size=3,
    )
)
@example([("", "batch_size", "64")])
def test_anything_typed_gives_settings_or_one_line(base, typed):
    if time.monotonic() - BEGAN.setdefault("fuzzer", time.monotonic()) > BUDGET_SECONDS:
        return
    words = [f"{sign}{name}={value}" for sign, name, value in typed]
    began, line = time.monotonic(), "settings"
    try:
        checked([*base, *words])
    except InputError as error:
        line = str(error)
    assert len(line.splitlines()) == 1
    assert time.monotonic() - began < 60, words
