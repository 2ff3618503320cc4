"""What a run is about to do, for its log: shown before anything is built or written."""

from pathlib import Path

import torch
from rich.filesize import decimal

from gns_pretrain.config.checks import Memory
from gns_pretrain.config.schema import Config
from gns_pretrain.errors import counted
from gns_pretrain.optim.power_lines import weight_decay_of
from gns_pretrain.system.processes import threads_per_process
from gns_pretrain.training.workload import Workload

TEXT_COLUMN = 11  # where the lines' texts begin


def header(
    config: Config,
    *,
    num_ranks: int,
    ranks_per_node: int,
    device: torch.device,
    workload: Workload,
    memory: Memory,
    timescale: float | None,
    directory: Path,
    begins: str,
) -> list[str]:
    """Format a run's plan, a line for each subject.

    Args:
        workload: with its data.
        memory: as `check_memory` counts it.
        timescale: of the weight decay, if it has one.
        begins: with what.
    """
    plan = workload.describe(device.type)
    on_gpu = device.type == "cuda"
    threads = config.launch.threads or threads_per_process(ranks_per_node)
    where = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {counted(threads, 'thread')}"
    nodes = -(-num_ranks // ranks_per_node)
    layout = config.parallel.resolved_kind(num_ranks)
    if config.parallel.tensor_size > 1:
        layout += f", parallel.tensor_size={config.parallel.tensor_size}"
    batch = config.batch_size
    measured = ", ".join(config.noise_scale.geometries) or "not measured"
    if config.noise_scale.geometries:
        period = counted(config.noise_scale.every_steps, "step")
        if (epochs := config.noise_scale.every_epochs) is not None:
            period = "epoch" if epochs == 1 else f"{epochs:g} epochs"
        measured += f", every {period}"
    averaging = config.averaging.kind
    averaged = "" if averaging == "none" else f"weights averaged ({averaging}); "
    at_first = "" if batch.policy == "constant" else " at the first batch size"
    settings, decay = config.optimizer, ""
    if timescale is not None:
        steps = workload.total_samples / batch.initial
        value = weight_decay_of(timescale, lr=settings.lr, steps=steps)
        decay = f", weight decay {value:.3g} over {timescale:.3g} of the run"
    lines = {
        "model": plan.model,
        "device": f"{where}; {counted(num_ranks, 'rank')} on {counted(nodes, 'node')}, {layout}",
        "data": plan.data,
        "batch": f"{plan.batch}, {batch.policy}; "
        f"{counted(workload.steps_at(batch.initial), 'step')}{at_first}",
        "optimizer": f"{settings.name}, lr {settings.lr:g}{decay}, "
        f"{config.schedule.kind}; {averaged}noise scale {measured}",
        "memory": f"at least {decimal(memory.needed)} of {decimal(memory.there)}"
        f"{' on each GPU' if on_gpu else ''}; a checkpoint takes {decimal(memory.checkpoint)}",
        "run": f"{directory}, {begins}",
    }
    return [*(f"{name:{TEXT_COLUMN}}{text}" for name, text in lines.items()), *plan.notes]
