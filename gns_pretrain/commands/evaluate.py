"""Evaluate checkpoints: loss, perplexity and bits per byte on any text, and tasks.

    gns-pretrain evaluate --checkpoint outputs/RUN                      on its validation split
    gns-pretrain evaluate --checkpoint outputs/A outputs/B --all --data data/c4
    gns-pretrain evaluate --checkpoint outputs/RUN --text a.jsonl 'b*.jsonl.gz'
    gns-pretrain evaluate --checkpoint outputs/RUN --tasks hellaswag,arc_easy --limit 100

Every token of the text but the first is predicted once, in sequences of --sequence-length tokens.
Loss is in nats a token, document ends among them; bits per byte are over the UTF-8 bytes of the
text. Tasks are those of lm-evaluation-harness (extra eval).
Also: torchrun --nproc-per-node 2 -m gns_pretrain evaluate ...
"""

import json
from dataclasses import asdict

from rich.table import Table

from gns_pretrain.fields import add_options, from_options, script_parser
from gns_pretrain.launch.evaluate import Evaluation, EvaluationRequest, evaluate
from gns_pretrain.system.terminal import Console, write


def main() -> None:
    parser = script_parser(__doc__)
    add_options(parser, EvaluationRequest)
    request = from_options(EvaluationRequest, parser.parse_args())
    found = evaluate(request)
    if not found:  # another rank prints it
        return
    if request.format == "json":
        write(json.dumps([asdict(each) for each in found], allow_nan=False))
        return
    console = Console(soft_wrap=True)
    if request.takes_loss:
        console.print(table_of_losses(found))
    if request.tasks:
        console.print(table_of_tasks(found))


def table_of_losses(found: list[Evaluation]) -> Table:
    """Format a row for each checkpoint."""
    table = Table(title=", ".join(dict.fromkeys(str(each.text) for each in found)))
    table.add_column("model", overflow="fold")
    for column in ("step", "tokens seen", "loss", "perplexity", "bits/byte", "tokens"):
        table.add_column(column, justify="right")
    for each in found:
        table.add_row(
            each.name,
            *(
                "-" if value is None else format(value, how)
                for value, how in (
                    (each.step, ","),
                    (each.tokens_seen, ","),
                    (each.loss, ".4f"),
                    (each.perplexity, ",.2f"),
                    (each.bits_per_byte, ".4f"),
                    (each.tokens, ","),
                )
            ),
        )
    return table


def table_of_tasks(found: list[Evaluation]) -> Table:
    """Format a row for each metric of each task and checkpoint."""
    table = Table(title="lm-evaluation-harness")
    table.add_column("model", overflow="fold")
    table.add_column("step", justify="right")
    for column in ("task", "metric"):
        table.add_column(column, overflow="fold")
    for column in ("value", "std. error"):
        table.add_column(column, justify="right")
    for each in found:
        for task, metrics in each.tasks.items():
            for metric, value in metrics.items():
                if isinstance(value, float) and "_stderr" not in metric:
                    name, _, filtered = metric.partition(",")
                    error = metrics.get(f"{name}_stderr,{filtered}")
                    error = f"{error:.4f}" if isinstance(error, float) else "-"
                    step = "-" if each.step is None else f"{each.step:,}"
                    table.add_row(each.name, step, task, metric, f"{value:.4f}", error)
    return table
