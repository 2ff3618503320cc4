"""Every YAML file composes, passes the checks, and builds what it names."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

from gns_pretrain.config.compose import as_yaml, settings_from
from gns_pretrain.config.hydra_errors import as_input_error
from gns_pretrain.config.register import register_configs
from gns_pretrain.config.schema import Config
from gns_pretrain.errors import InputError
from gns_pretrain.launch.build import build_adaptive_batch_size
from gns_pretrain.model.config import count_parameters
from gns_pretrain.model.llama import Llama
from gns_pretrain.noise_scale.geometries import Measurement
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.optim import OPTIMIZERS
from gns_pretrain.parallel.mesh import World
from gns_pretrain.runs.identity import flatten
from gns_pretrain.tracking.jsonl import summarize
from tests.settings import odd_model, planned

ROOT = Path(__file__).parents[3]
CONF = ROOT / "gns_pretrain" / "conf"
# Groups without a choice in gns_pretrain/conf/train.yaml, which a command adds.
ADDED = ("rates", "role", "start", "tuned")
CHOICES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
SIZES = ("small", "middle", "large")
SCALES = ("demo", "h200", "paper", "paper_1b")
TUNED = {
    "signsgd": ["lr"],
    "signum": ["lr", "momentum"],
    "adamw": ["lr", "beta1", "beta2"],
    "specsgd": ["lr", "adamw_lr"],
    "muon": ["lr", "momentum", "adamw_lr"],
}
TABLES = {
    "table2": [
        f"{x}_{role}" for x in TUNED for role in ("small", "large", "euclidean", "adaptive")
    ],
    "table3": [
        f"{x}_{y}" for x in ("signsgd", "signum", "adamw") for y in ("baseline", "adaptive")
    ],
    "table8": [f"constant_{size}" for size in SIZES]
    + [f"adaptive_{size}_{lr}" for size in SIZES for lr in ("unscaled", "scaled")],
    "table9": [f"{geometry}_{size}" for size in SIZES for geometry in ("euclidean", "manhattan")],
    "theta_sensitivity": ["theta_low", "theta_middle", "theta_high"],
}
CELLS = [f"{table}/{cell}" for table, cells in TABLES.items() for cell in cells]
# Stands in for what a search has not found yet; no scale has it.
ANY_TUNING = [f"scale.{name}.{key}=0.123" for name, keys in TUNED.items() for key in keys]
ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")
# Values that a user has to give.
GIVEN = {
    ("data", "shards"): ["data.path=somewhere"],
    ("data", "images"): ["data.path=somewhere", "workload=cifar10"],
    ("data", "mixture"): ["data.sources=[{path:a,weight:2},{path:b/c}]"],
    ("optimizer", "custom"): ["optimizer.class_path=torch.optim.NAdam"],
    # Tuned for images alone.
    ("tuned", "sgd"): ["workload=cifar10"],
    ("tuned", "sgd_momentum"): ["workload=cifar10"],
    ("tuned", "normalized_sgd"): ["workload=cifar10"],
}


@pytest.fixture(scope="module", autouse=True)
def hydra():
    """Hydra, initialised once for all files."""
    register_configs()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str) -> Config:
    typed = [override for override in overrides if override not in ANY_TUNING]
    return settings_from(compose("train", overrides=list(overrides)), typed)


@pytest.mark.parametrize("cell", CELLS)
def test_cell_is_what_its_name_says_at_every_scale(cell):
    table, name = cell.split("/")
    for scale in SCALES:
        if scale == ("paper" if table == "table3" else "paper_1b"):
            continue  # Table 3 is the larger model's, and the other tables are not
        config = composed(f"+experiment={cell}", f"scale={scale}", "seed=7", *ANY_TUNING)
        assert (config.table, config.cell) == (table, name)
        assert config.run_name == f"{table}-{name}-{scale}-seed7"
        assert config.optimizer.lr == 0.123
        assert config.batch_size.initial == getattr(config.scale, f"{size_of(cell)}_batch")
        assert config.metrics.wandb.job_type == config.batch_size.policy
        assert config.metrics.wandb.group == f"{table}/{config.optimizer.name}"
        if is_constant(name):
            assert config.batch_size.policy == "constant"
            assert config.noise_scale.geometries == []
            assert config.metrics.wandb.tags == [scale]
        else:
            assert config.batch_size.policy == "adaptive"
            assert config.noise_scale.geometries == [geometry_of(name)]
            assert config.batch_size.geometry == geometry_of(name)
            assert config.batch_size.theta == theta_of(name)
            assert config.batch_size.lr_scaling == ("none" if "unscaled" in name else "sqrt")
            assert config.metrics.wandb.tags == [scale, geometry_of(name), "plug_in"]


# By the prefix of their cells: optimizer and geometry.
OF_IMAGES = {
    "msgd": ("sgd_momentum", "euclidean"),
    "sgd": ("sgd", "euclidean"),
    "nsgd": ("normalized_sgd", "euclidean"),
    "signsgd": ("signsgd", "manhattan"),
    "signum": ("signum", "manhattan"),
    "adamw": ("adamw", "manhattan"),
    "muon": ("muon", "nuclear"),
}
# Roles of a table's cells, and at scale=demo and paper the batch that each begins with.
STARTS = {
    "table4": {"baseline": (32, 128), "adaptive": (32, 128)},
    "table10": {"baseline": (64, 512), "adaptive": (32, 256), "adaptive_large": (128, 1024)},
}
TUNED_ON_IMAGES = [
    f"scale.{optimizer}.{key}=0.123"
    for optimizer, _ in OF_IMAGES.values()
    for key in TUNED.get(optimizer, ["lr", "momentum"])
]


@pytest.mark.parametrize("table", STARTS)
def test_sweep_of_images_names_every_cell_in_order(table):
    node = compose("train", overrides=[f"+sweep={table}"], return_hydra_config=True)
    cells = [f"{table}/{name}_{role}" for name in OF_IMAGES for role in STARTS[table]]
    assert node.hydra.sweeper.params["+experiment"].split(",") == cells


@pytest.mark.parametrize(
    ("scale", "table", "cell"),
    [
        ("paper", "table4", "msgd_baseline"),
        ("paper", "table4", "signum_adaptive"),
        ("demo", "table4", "nsgd_adaptive"),
        ("paper", "table10", "sgd_baseline"),
        ("paper", "table10", "muon_adaptive"),
        ("paper", "table10", "nsgd_adaptive_large"),
        ("demo", "table10", "adamw_adaptive_large"),
    ],
)
def test_cell_of_an_image_table_is_the_papers(scale, table, cell):
    """Appendix C.2, Tables 6 and 7."""
    name, role = cell.split("_", 1)
    optimizer, geometry = OF_IMAGES[name]
    config = composed(f"+experiment={table}/{cell}", f"scale={scale}", *TUNED_ON_IMAGES)
    assert (config.optimizer.name, config.optimizer.lr) == (optimizer, 0.123)
    assert config.batch_size.initial == STARTS[table][role][scale == "paper"]
    assert config.batch_size.policy == ("constant" if role == "baseline" else "adaptive")
    assert config.noise_scale.geometries == ([] if role == "baseline" else [geometry])
    if name == "nsgd":
        assert (config.optimizer.normalize, config.optimizer.momentum) == (True, 0.0)
    assert config.optimizer.weight_decay == (1e-4 if table == "table4" else 0.0)
    warmup, every = {"table4": (0.04, 3), "table10": (0.05, 1)}[table]
    assert (config.schedule.warmup_fraction, config.schedule.final_lr) == (warmup, 1e-6)
    assert config.data.or_embedded == (scale == "demo")
    if scale == "paper":
        assert config.epochs == (200 if (table, name) == ("table4", "signum") else 100)
        assert config.noise_scale.every_epochs == every


@pytest.mark.parametrize("workload", ["imagewoof", "cifar10"])
def test_search_of_normalized_sgd_is_without_momentum_at_the_baselines_batch(workload):
    words = [f"+sweep=tune_{workload}_normalized_sgd", "scale=demo"]
    node = compose("train", overrides=words, return_hydra_config=True)
    params = node.hydra.sweeper.params
    assert float(params["optimizer.momentum"]) == 0
    assert "0.1" in params["optimizer.lr"].split(",")
    point = composed(f"+experiment={params['+experiment']}", "scale=demo", "optimizer.lr=0.1")
    assert (point.optimizer.name, point.optimizer.normalize) == ("normalized_sgd", True)
    assert point.batch_size.policy == "constant"
    assert point.batch_size.initial == {"imagewoof": 32, "cifar10": 64}[workload]


def test_scale_without_numbers_for_images_says_for_what_it_has_them():
    with pytest.raises(MissingConfigException) as raised:
        composed("workload=cifar10", "scale=h200")
    assert str(as_input_error(raised.value)) == (
        "scale=h200 has no numbers for workload=cifar10, only for language; use another scale"
    )


def is_constant(name: str) -> bool:
    first, last = name.split("_")[0], name.split("_")[-1]
    return first == "constant" or (first in TUNED and last in ("small", "large", "baseline"))


def size_of(cell: str) -> str:
    """The batch that a cell begins at; signSGD's adaptive ones of Table 2 at the large."""
    table, name = cell.split("/")
    if table == "table3":
        return "large" if "baseline" in name else "small"
    sizes = [size for size in SIZES if size in name.split("_")]
    if sizes and table != "theta_sensitivity":
        return sizes[0]
    return "large" if table == "table2" and "signsgd" in name else "small"


def geometry_of(name: str) -> str:
    if "euclidean" in name:
        return "euclidean"
    return "nuclear" if name.split("_")[0] in ("specsgd", "muon") else "manhattan"


def theta_of(name: str) -> float:
    if "euclidean" in name:
        return 0.3
    return {"theta_low": 0.5, "theta_high": 0.7}.get(name, 0.6)


@pytest.mark.parametrize(
    ("cell", "sizes"),
    [("signsgd_adaptive", [96, 128, 256, 384]), ("signum_adaptive", [128, 192, 256, 320])],
)
def test_a_batch_grows_in_the_published_steps_at_the_papers_scale(cell, sizes):
    """What the curves of Figures 3 and 2 show, from 64 on 8 GPUs."""
    config = composed(f"+experiment=table2/{cell}", "scale=paper", *ANY_TUNING)
    feasible = config.feasible_sizes(config.batch_size, num_ranks=8)
    grown = [64]
    while len(grown) <= len(sizes):
        grown.append(feasible.at_least(grown[-1] + 1).batch_size)
    assert grown[1:] == sizes


def batch_sizes(config: Config, later: int) -> list[int]:
    """Of each step, as a growing noise scale has them that is read some steps late."""
    adaptive = build_adaptive_batch_size(config, planned(config), num_ranks=8)
    taken = []
    for step in range(1, 1001):
        adaptive.decide()
        taken.append(adaptive.batch_size)
        measured = step - later
        read = []
        if measured > 0 and config.noise_scale.measures_at(measured):
            read.append(Measurement(*config.batch_size.reads, 80.0 * measured**0.3, 1.0, 8, 64))
        adaptive.observe(read)
    return taken


@pytest.mark.parametrize(
    "policy",
    [["noise_scale=manhattan"], ["batch_size=norm_test", "noise_scale=euclidean"]],
    ids=["adaptive", "norm_test"],
)
def test_late_readings_change_no_decision_at_the_papers_scale(policy):
    config = composed("+experiment=table2/signum_adaptive", "scale=paper", *ANY_TUNING, *policy)
    config.batch_size.warmup_fraction = 0.0
    later = config.noise_scale.read_after_steps
    expected = batch_sizes(config, 0)
    assert len(set(expected)) > 2
    assert batch_sizes(config, later) == expected
    # One step more, and the measurement of step 1 misses the decision before step 10.
    assert batch_sizes(config, later + 1) != expected


def test_measuring_more_does_not_change_what_a_cell_follows():
    config = composed("+experiment=table2/muon_adaptive", "scale=demo", "noise_scale=all")
    assert config.batch_size.geometry == "nuclear"


@pytest.mark.parametrize("table", TABLES)
def test_sweep_names_every_cell_of_its_table_in_order(table):
    words = [f"+sweep={table}", "scale=paper"]
    node = compose("train", overrides=words, return_hydra_config=True)
    assert node.hydra.mode.name == "MULTIRUN"
    swept = node.hydra.sweeper.params["+experiment"].split(",")
    assert swept == [f"{table}/{cell}" for cell in TABLES[table]]
    assert node.hydra.sweeper.params["seed"] == "range(0,10)"


@pytest.mark.parametrize("name", TUNED)
def test_search_covers_the_papers_space(name):
    words = [f"+sweep=tune_{name}", "scale=demo"]
    node = compose("train", overrides=words, return_hydra_config=True)
    params = node.hydra.sweeper.params
    rates = params["optimizer.lr"].split(",")
    assert rates == [*(f"{x}e-4" for x in (1, 2, 4, 6, 8)), "1e-3", "2e-3", "4e-3", "8e-3", "1e-2"]
    for key in TUNED[name]:
        assert f"optimizer.{key}" in params or key == "adamw_lr"
    point = composed(f"+experiment={params['+experiment']}", "scale=demo", "optimizer.lr=0.1")
    assert (point.optimizer.name, point.batch_size.policy) == (name, "constant")
    assert point.batch_size.initial == (64 if name == "signsgd" else 16)
    assert point.run_name == f"tune-{name}-demo-seed0-lr0.1"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "scale.muon.lr has no value at scale=none; choose a scale that has it"),
        (["scale=paper"], r"scale.muon.lr has no value at scale=paper; \+sweep=tune_muon"),
    ],
    ids=["no-scale", "not-tuned"],
)
def test_number_that_the_scale_lacks_is_asked_for(overrides, line):
    with pytest.raises(InputError, match=line):
        composed("+experiment=table2/muon_adaptive", *overrides)


def test_unknown_cell_is_refused_with_those_of_its_table():
    with pytest.raises(MissingConfigException) as raised:
        composed("+experiment=table9/theta_low")
    refusal = str(as_input_error(raised.value))
    assert refusal.startswith("experiment/table9=theta_low: there is no such choice; use one of ")
    assert "euclidean_large" in refusal


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["optimizer.kwargs={a:1}"],
            "optimizer.kwargs: there is no such setting; optimizer=custom has it",
        ),
        (
            ["optimizer=sgd", "optimizer.beta1=0.9"],
            "optimizer.beta1: there is no such setting; optimizer=adamw has it",
        ),
        (["optimizer=muon", "optimizer.adamw.lrr=1"], "did you mean optimizer.adamw.lr?"),
        (["optimizer=sgd", "optimizer.momentumm=0.9"], "did you mean optimizer.momentum?"),
        (["optimiser=sgd"], "did you mean optimizer?"),
        (["something=1"], "--cfg job lists those of a command"),
        (
            ["data=mixture", "data.sources=[a,b]"],
            "is {path: data/c4, weight: 0.7}; list them in []",
        ),
        (["data=mixture", "data.sources=a"], "is {path: data/c4, weight: 0.7}; list them in []"),
        (["trainer.devices=2"], "did you mean launch.nproc_per_node?"),
        (["training.seq_len=64"], "did you mean data.sequence_length?"),
        (
            ["train.clip=1"],
            "train.clip: there is no such setting; --cfg job lists those of a command",
        ),
    ],
    ids=[
        *("another-choice", "chosen-group", "nested", "chosen-choice", "group", "nothing-close"),
        *("sources", "source"),
        *("other-trainer", "other-trainer-name", "other-trainer-nothing-close"),
    ],
)
def test_setting_that_a_choice_lacks_is_refused_with_one_that_a_command_can_take(overrides, line):
    with pytest.raises(ConfigCompositionException) as raised:
        composed(*overrides)
    assert str(as_input_error(raised.value)).endswith(line)


@pytest.mark.parametrize("choice", sorted(OPTIMIZERS))
def test_choice_named_in_a_hint_exists(choice):
    assert ("optimizer", choice) in CHOICES


def test_run_like_a_cell_is_in_no_table():
    config = composed("+tuned=muon", "+role=nuclear", "+start=small", "scale=demo")
    cell = composed("+experiment=table2/muon_adaptive", "scale=demo")
    assert config.run_name == "demo-muon-seed0-role_nuclear-scale_demo-start_small-tuned_muon"
    assert (config.optimizer, config.batch_size) == (cell.optimizer, cell.batch_size)


def test_predicted_rates_are_those_searched_for_at_the_demos_width():
    words = ("+tuned=muon", "+role=constant", "+start=small", "scale=paper", "+rates=predicted")
    demo, predicted = composed("scale=demo"), composed(*words)
    for optimizer, numbers in TUNED.items():
        for number in numbers:
            found = (getattr(getattr(c.scale, optimizer), number) for c in (demo, predicted))
            assert len(set(found)) == 1, (optimizer, number)
    model = predicted.model
    assert (model.parametrization, model.mup_base_dim) == ("mup", demo.model.dim)
    assert predicted.run_name.endswith(
        "rates_predicted-role_constant-scale_paper-start_small-tuned_muon"
    )


def test_larger_models_table_is_refused_at_the_smaller_ones_scale():
    with pytest.raises(InputError, match="use scale=paper_1b"):
        composed("+experiment=table3/signsgd_baseline", "scale=paper")


@pytest.mark.parametrize(("cell", "named"), [("adaptive", "-micro_batch_size1"), ("small", "")])
def test_run_name_holds_the_micro_batch_where_it_decides_the_samples(cell, named):
    words = [f"+experiment=table2/signum_{cell}", "scale=demo", "micro_batch_size=1"]
    assert composed(*words).run_name == f"table2-signum_{cell}-demo-seed0{named}"


def test_run_name_holds_whatever_else_is_given_and_not_what_changes_no_result():
    words = [
        "+experiment=table2/signum_adaptive",
        "scale=demo",
        "seed=3",
        "batch_size.theta=0.5",
        "noise_scale.estimates=[cross_fitted]",
        "launch.threads=1",
        "metrics=wandb",
        "scale.signum.lr=1e-2",
    ]
    assert composed(*words).run_name == (
        "table2-signum_adaptive-demo-seed3-theta0.5-estimates_cross_fitted-signum.lr0.01"
    )


def test_run_name_that_overrides_make_long_ends_in_a_hash_of_them_all():
    def name(first: float) -> str:
        words = [f"scale.{name}.lr=0.12345678{first}" for name in TUNED]
        words += [f"scale.{name}.adamw_lr=0.12345678" for name in ("specsgd", "muon")]
        return composed("+experiment=table2/signum_adaptive", "scale=demo", *words).run_name

    assert len(name(1)) < 150
    assert re.fullmatch(
        r"table2-signum_adaptive-demo-seed0-adamw.lr0.123456781-.*-[0-9a-f]{8}", name(1)
    )
    assert name(1)[-8:] != name(2)[-8:]
    assert name(1) == name(1)


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (["optimizer.lr=1e-3"], "-lr1e-3"),
        (["optimizer.lr=0.001"], "-lr1e-3"),
        (["optimizer.lr=1", "optimizer.lr=2e-4"], "-lr2e-4"),
        (
            ["token_budget=3200000000", "optimizer.weight_decay=0"],
            "-weight_decay0-token_budget3.2B",
        ),
        (
            ["token_budget=102400", "+experiment=demo/constant"],
            "demo-constant-seed0-token_budget102.4k",
        ),
        (
            ["noise_scale=nuclear", "noise_scale.every_steps=20"],
            "-noise_scale_nuclear-every_steps20",
        ),
        (
            ["batch_size=staged", "batch_size.stage_sizes=[32,64]"],
            "-batch_size_staged-stage_sizes_32_64",
        ),
        (["data=shards", "data.path=/a/b/c4"], "-data_shards-path_c4"),
        (["init.from=outputs/a", "init.what=all"], "-from_outputs_a-what_all"),
        (
            ["gradient_clip=null", "model.tie_embeddings=true"],
            "-gradient_clip_null-tie_embeddings_true",
        ),
        (["optimizer=muon", "optimizer.adamw.lr=1e-3"], "tiny-muon-seed0-adamw.lr1e-3"),
        (
            ["batch_size.shadows=[{theta: 0.5}]", "noise_scale=manhattan"],
            "-shadows_theta_0.5-noise_scale_manhattan",
        ),
        (["model=small", "optimizer=muon", "seed=3"], "small-muon-seed3"),
        (["run_name=mine", "seed=3"], "mine"),
        # What changes nothing that is trained, so that the run resumes.
        (["launch.nproc_per_node=2", "parallel=fsdp", "metrics=wandb", "micro_batch_size=4"], ""),
        (["evaluation.every_tokens=1000", "checkpoint.every_steps=7", "metrics.log_every=1"], ""),
        (["output_directory=elsewhere", "resume=never", "bad_steps.skip=true", "dry_run=true"], ""),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_default_run_name_holds_what_was_overridden(words, more):
    name = composed(*words).run_name
    assert name == (f"tiny-adamw-seed0{more}" if more[:1] in ("", "-") else more)


def test_schema_is_no_choice():
    listed = ConfigStore.instance().list("optimizer")
    assert "adamw.yaml" not in listed
    assert [name for name in listed if "schema" in name] == []
    with pytest.raises(InputError, match=r"optimizer=schema_signum: .* no such choice; .* muon"):
        composed("optimizer=schema_signum")


def test_default_run_composes_and_names_itself():
    config = composed()
    assert config.run_name == "tiny-adamw-seed0"
    assert config.token_budget > 0


@pytest.mark.parametrize(
    ("group", "choice"), CHOICES, ids=[f"{group}-{choice}" for group, choice in CHOICES]
)
def test_file_composes(group, choice):
    added = [f"+{group}={choice}", "scale=demo"] if group in ADDED else [f"{group}={choice}"]
    assert as_yaml(composed(*added, *GIVEN.get((group, choice), [])))


@pytest.mark.parametrize("choice", ["adaptive", "constant"])
def test_demo_composes(choice):
    assert composed(f"+experiment=demo/{choice}").run_name == f"demo-{choice}-seed0"


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_yaml_holds_only_what_differs_from_the_default_of_its_class(path):
    values = OmegaConf.to_container(OmegaConf.load(path))
    schemas = [name for name in values.pop("defaults", []) if "schema_" in name]
    if schemas:
        schema = ConfigStore.instance().load(f"{path.parent.name}/{schemas[0]}.yaml").node
        defaults = flatten(OmegaConf.to_container(OmegaConf.structured(schema)))
        assert [key for key, value in flatten(values).items() if defaults[key] == value] == []


LLAMAS = [p.stem for p in sorted(CONF.glob("model/*.yaml")) if "schema_llama" in p.read_text()]


@pytest.mark.parametrize("choice", LLAMAS)
def test_model_builds_with_the_parameters_it_says(choice):
    shape = composed(f"model={choice}", "model.vocab_size=128256").model
    with torch.device("meta"):
        model = Llama(shape)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(shape).total


@pytest.mark.parametrize("choice", [c for g, c in CHOICES if g == "optimizer"])
def test_optimizer_builds_over_all_parameters(choice):
    settings = composed(f"optimizer={choice}", *GIVEN.get(("optimizer", choice), [])).optimizer
    model = Llama(odd_model())
    model.init_weights(seed=0)
    optimizer = settings.build(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("choice", [c for g, c in CHOICES if g == "noise_scale"])
def test_noise_scale_builds_a_meter(choice):
    settings = composed(f"noise_scale={choice}").noise_scale
    model = Llama(odd_model())
    optimizer = composed(f"optimizer={'adamw' if choice == 'adam' else 'muon'}").optimizer
    if choice == "none":
        assert settings.geometries == []
        return
    meter = NoiseMeter(model, settings, optimizer=optimizer.build(model))
    assert len(meter.tap.weights) == len(list(model.parameters()))


def test_each_point_of_the_sweep_of_w_and_b_is_a_run_with_a_name_of_its_own():
    sweep = OmegaConf.load(ROOT / "examples" / "wandb_sweep.yaml")
    command = OmegaConf.to_container(sweep.command, resolve=False)
    assert command[:3] + command[-1:] == ["${env}", "gns-pretrain", "train", "${args_no_hyphens}"]
    values = {name: list(given["values"]) for name, given in sweep.parameters.items()}
    first = {name: given[0] for name, given in values.items()}
    points = [first | {name: value} for name in values for value in values[name][1:]]
    names = set()
    for point in [first, *points]:
        words = [f"{name}={value}" for name, value in point.items()]
        config = composed(*command[3:-1], *words)
        assert config.metrics.wandb.enabled
        assert {name: flatten(asdict(config))[name] for name in point} == point
        names.add(config.run_name)
    assert len(names) == 1 + len(points) == 6
    assert sweep.metric.name.removeprefix("final/") in summarize([])
