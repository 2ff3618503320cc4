"""Speed of a training step against transformers' LlamaForCausalLM of the same shape and weights."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig, count_parameters
from gns_pretrain.model.huggingface import ExportedText, hf_config, hf_names
from gns_pretrain.model.llama import Llama

# Dense bfloat16 multiply-adds a second, times two; from the makers' data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
WARM_UP_STEPS = 2


def compare_with_transformers(
    config: LlamaConfig,
    *,
    batch_size: int = 8,
    sequence_length: int = 256,
    pairs: int = 20,
    compiled: bool = False,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Time forward, backward and AdamW of both models in turns, in this process.

    The ratio is taken pair by pair and its median reported, so that whatever else the machine
    does slows both. On a GPU both compute in bfloat16 from float32 weights. Compiled, each model
    has its blocks compiled one by one.

    Args:
        config: shape of both, with a vocabulary.
        batch_size: sequences in a step.
        sequence_length: tokens in a sequence.
        pairs: timed steps of each.
        compiled: compile the blocks of both.
        device: default: the GPU if there is one.

    Returns:
        One row: times in seconds, `ratio` ours / transformers' with its quartiles, the
        difference of the first losses, and on a known GPU the share of its peak that the
        model's own arithmetic makes up.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = torch.randint(
        config.known_vocab_size,
        (batch_size, sequence_length + 1),
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    ours, theirs = _twins(config, sequence_length, compiled=compiled, device=device)
    steps = {
        "ours": _training_step(ours, _our_loss(ours, tokens, targets)),
        "transformers": _training_step(theirs, _their_loss(theirs, tokens, targets)),
    }
    losses = {name: [step()[1] for _ in range(WARM_UP_STEPS)] for name, step in steps.items()}
    speed = _speed(_alternate(steps, pairs), tokens_in_step=batch_size * sequence_length)
    return {
        "measured": "model",
        "model": config.name,
        "vocab_size": config.known_vocab_size,
        "parameters": count_parameters(config).total,
        "device": _device_name(device),
        "dtype": str(ours.compute_dtype).removeprefix("torch."),
        "compiled": compiled,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "pairs": pairs,
        **speed,
        "loss_difference": losses["ours"][0] - losses["transformers"][0],
        "flops_share": _flops_share(config, sequence_length, speed["tokens_per_second"], device),
    }


def _twins(
    config: LlamaConfig, sequence_length: int, *, compiled: bool, device: torch.device
) -> tuple[Llama, Any]:
    """Our model and transformers', of the same weights."""
    with device:
        ours = Llama(config)
    ours.init_weights(seed=0)
    theirs = _transformers_twin(ours, sequence_length)
    if compiled:
        ours.compile_blocks()
        for block in theirs.model.layers:
            block.compile()
    return ours, theirs


def _speed(seconds: dict[str, list[float]], *, tokens_in_step: int) -> dict[str, Any]:
    """What the paired times of both say, as fields of the row."""
    ratios = [
        ours / theirs for ours, theirs in zip(seconds["ours"], seconds["transformers"], strict=True)
    ]
    low, middle, high = statistics.quantiles(ratios, n=4)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": round(median["ours"], 5),
        "transformers_seconds": round(median["transformers"], 5),
        "ratio": round(middle, 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)],
        "tokens_per_second": round(tokens_in_step / median["ours"]),
        "transformers_tokens_per_second": round(tokens_in_step / median["transformers"]),
    }


def flops_per_token(config: LlamaConfig, sequence_length: int) -> float:
    """Floating-point operations of forward and backward for one token; recomputation not counted.

        6 P + 6 L D T

    P parameters that multiply (all but an untied embedding), each used once forward and twice
    backward at 2 operations; L layers whose causal attention averages T / 2 keys of width D,
    scored and mixed.
    """
    attention = config.num_layers * config.dim * sequence_length
    return 6.0 * (count_parameters(config).with_output + attention)


def _transformers_twin(model: Llama, sequence_length: int) -> Any:
    """LlamaForCausalLM with a copy of the model's weights."""
    try:
        from transformers import LlamaConfig as TheirConfig
        from transformers import LlamaForCausalLM
    except ImportError as error:
        raise InputError(
            "the comparison needs transformers; pip install 'gns-pretrain[huggingface]'"
        ) from error
    values = hf_config(model.config, ExportedText(max_positions=sequence_length))
    for key in ("architectures", "model_type", "rope_theta", "rope_scaling"):
        del values[key]
    with model.embedding.weight.device:
        twin = LlamaForCausalLM(TheirConfig(**values, attn_implementation="sdpa"))
    names = hf_names(model.config)
    state = {names[name]: value for name, value in model.state_dict().items()}
    # strict=False: transformers lists a tied output matrix a second time.
    problems = twin.load_state_dict(state, strict=False)
    assert not problems.unexpected_keys, problems
    twin.train()
    return twin


def _our_loss(model: Llama, tokens: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    model.compute_dtype = torch.bfloat16 if tokens.is_cuda else torch.float32
    return lambda: model(tokens, targets)


def _their_loss(model: Any, tokens: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    precision = torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else nullcontext()

    def loss() -> Tensor:
        with precision:
            # shift_labels: the targets as they are; labels alone would lose the last position.
            output = model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False)
        result: Tensor = output.loss
        return result

    return loss


def _training_step(
    model: nn.Module, loss: Callable[[], Tensor]
) -> Callable[[], tuple[float, float]]:
    """A function that takes one step and returns its seconds and its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    on_gpu = next(model.parameters()).is_cuda

    def step() -> tuple[float, float]:
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began, value.item()

    return step


def _alternate(
    steps: dict[str, Callable[[], tuple[float, float]]], pairs: int
) -> dict[str, list[float]]:
    """Seconds of each step; who goes first changes from pair to pair."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(pairs):
        for name in order:
            seconds[name].append(steps[name]()[0])
        order.reverse()
    return seconds


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def _flops_share(
    config: LlamaConfig, sequence_length: int, tokens_per_second: float, device: torch.device
) -> float | None:
    name = _device_name(device)
    peaks = [peak for known, peak in PEAK_FLOPS.items() if known in name]
    if not peaks:
        return None
    return round(tokens_per_second * flops_per_token(config, sequence_length) / peaks[0], 4)
