"""What Hydra finds beside the files under conf/: schemas, experiments and sweeps."""

from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from gns_pretrain.config.schema import VARIANTS, Config
from gns_pretrain.fields import at_home

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "conf"
SCHEMA = "schema_"  # begins the names of dataclasses, from which YAML files begin
_every_name = ConfigStore.list
# Keys of a table's cell that choose a file, as entries of a defaults list; the others are settings.
CHOICES = {
    "role": "/role",
    "start": "/start",
    "tuned": "/tuned",
    "optimizer": "override /optimizer",  # Hydra wants overrides last
    "workload": "override /workload",
}


def register_configs() -> None:
    """Register the schemas, from which each group's YAML files begin, and conf/tables.yaml."""
    OmegaConf.register_new_resolver("home", at_home, replace=True)
    # Of a first batch size, which `compose` replaces; Hydra's lists of words have it as typed.
    OmegaConf.register_new_resolver("auto", lambda: "auto", replace=True)
    ConfigStore.list = _choices  # type: ignore[method-assign]
    store = ConfigStore.instance()
    store.store(name=f"{SCHEMA}train", node=Config)
    for field in fields(Config):
        if (CONFIG_FOLDER / field.name).is_dir():
            for name, schema in VARIANTS.get(field.name, {field.name: field.type}).items():
                store.store(group=field.name, name=f"{SCHEMA}{name}", node=schema)
    register_experiments()


def _choices(self: ConfigStore, path: str) -> list[str]:
    """What Hydra lists, in completion and help as well: no schemas, which nobody can choose."""
    return [name for name in _every_name(self, path) if not name.startswith(SCHEMA)]


def choices_of(group: str) -> list[str]:
    """List a group's choices; empty where there is no such group."""
    if not group:
        return []
    found = {path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml")}
    with suppress(OSError):
        found |= {Path(name).stem for name in ConfigStore.instance().list(group)}
    return sorted(found)


def register_experiments() -> None:
    """Register `+experiment=TABLE/CELL`, `+sweep=TABLE` and, of a search, `+sweep=TABLE_CELL`."""
    file = OmegaConf.to_container(OmegaConf.load(CONFIG_FOLDER / "tables.yaml"))
    for table, cells in cast(dict[str, dict[str, Any]], file).items():
        swept, workload = [], []
        for cell, values in cells.items():
            defaults = [{CHOICES[key]: values.pop(key)} for key in CHOICES if key in values]
            search = values.pop("search", None)
            chosen = [entry for entry in defaults if min(entry).startswith("override")]
            experiment = {"defaults": ["/cell", *defaults, "_self_"], "table": table, "cell": cell}
            _register(f"experiment/{table}", cell, experiment | values)
            if search is None:
                swept.append(f"{table}/{cell}")
                workload = chosen
            else:
                # With the search's optimizer, whose settings can then be typed beside `+sweep=`.
                params = {"+experiment": f"{table}/{cell}", **search}
                _register_sweep(f"{table}_{cell}", params, chosen)
        if swept:
            params = {"seed": "${scale.seeds}", "+experiment": ",".join(swept)}
            _register_sweep(table, params, workload)
    # Which branches there are, its sweeper finds in the checkpoints of a run.
    _register_sweep("critical_batch", {}, [{"override /hydra/sweeper": "branches"}])


def _register_sweep(name: str, params: dict[str, str], defaults: list[Any] | None = None) -> None:
    multirun: dict[str, Any] = {"mode": "MULTIRUN"}
    if params:
        multirun["sweeper"] = {"params": params}
    _register("sweep", name, {"defaults": defaults or [], "hydra": multirun})


def _register(group: str, name: str, node: dict[str, Any]) -> None:
    ConfigStore.instance().store(group=group, name=name, node=node, package="_global_")
