"""Models that are not ours, tiny: what a stranger's loop trains.

Each gives a loss from a batch, as transformers' models do: `model(**batch)["loss"]`. Widths are
such that neither two nor four ranks divide most of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from tests.dense_reference import Batch

VOCABULARY, CLASSES = 61, 5


@dataclass(frozen=True)
class ForeignModel:
    """How a model is built, fed and sharded, and which of its weights are matrices."""

    build: Callable[[], nn.Module]
    sample: Callable[[torch.Generator], Batch]  # one micro-batch
    matrices: tuple[str, ...]  # patterns of names
    units: Callable[[nn.Module], list[nn.Module]]  # what FSDP2 wraps beside the root
    sample_size: int = 1  # sequences or images of a micro-batch
    tensor_plan: dict[str, type[ParallelStyle]] = field(default_factory=dict)

    def new(self) -> nn.Module:
        """The same weights on every rank and each time."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.build()

    def samples(self, count: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(3)
        return [self.sample(generator) for _ in range(count)]

    def matrix_names(self, model: nn.Module) -> list[str]:
        return [
            name
            for name, p in model.named_parameters()
            if p.requires_grad and any(fnmatch(name, pattern) for pattern in self.matrices)
        ]


def tokens(generator: torch.Generator) -> Batch:
    # Small numbers come often, so that samples agree on something. A matrix is wider than 7.
    ids = (VOCABULARY * torch.rand(1, 7, generator=generator).pow(3)).long()
    return {"input_ids": ids, "labels": ids}


def images(generator: torch.Generator, count: int, width: int) -> Batch:
    return {
        "pixel_values": torch.randn(count, 3, width, width, generator=generator) + 0.5,
        "labels": classes(generator, count),
    }


def rows(generator: torch.Generator) -> Batch:
    return {
        "x": torch.randn(3, 9, generator=generator) + 0.5,
        "labels": classes(generator, 3),
    }


def classes(generator: torch.Generator, count: int) -> Tensor:
    return torch.randint(2, (count,), generator=generator)  # the first two of all


class OddMLP(nn.Module):
    """With a frozen, an unused and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(9, 14)
        self.first = nn.Linear(14, 14)
        self.again = nn.Linear(14, 14, bias=False)
        self.again.weight = self.first.weight
        self.frozen = nn.Linear(14, 14).requires_grad_(False)
        self.unused = nn.Linear(7, 6)
        self.middle = nn.ModuleDict({"up": nn.Linear(14, 22), "down": nn.Linear(22, 14)})
        self.head = nn.Linear(14, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.enter(x).tanh()
        x = self.again(self.first(x).tanh()) + self.frozen(x)
        x = x + self.middle["down"](self.middle["up"](x).relu())
        return {"loss": F.cross_entropy(self.head(x), labels)}


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=20,
            intermediate_size=26,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            max_position_embeddings=16,
            initializer_range=0.2,
            use_cache=False,
        )
    )


def gpt2() -> nn.Module:
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=18,
            n_layer=2,
            n_head=3,
            initializer_range=0.2,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            **dropout,
        )
    )


def resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=6,
            hidden_sizes=[6, 10],
            depths=[1, 2],
            layer_type="basic",
            num_labels=CLASSES,
        )
    )


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=18,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=26,
            image_size=8,
            patch_size=4,
            num_labels=CLASSES,
            initializer_range=0.2,
        )
    )


LLAMA_PLAN = {
    **{f"model.layers.*.self_attn.{x}_proj": ColwiseParallel for x in "qkv"},
    "model.layers.*.self_attn.o_proj": RowwiseParallel,
    "model.layers.*.mlp.gate_proj": ColwiseParallel,
    "model.layers.*.mlp.up_proj": ColwiseParallel,
    "model.layers.*.mlp.down_proj": RowwiseParallel,
}

FOREIGN_MODELS = {
    "Llama": ForeignModel(
        llama,
        tokens,
        ("model.layers.*_proj.weight",),
        lambda model: list(model.model.layers),
        tensor_plan=LLAMA_PLAN,
    ),
    "GPT-2": ForeignModel(
        gpt2,
        tokens,
        ("transformer.h.*.c_*.weight",),
        lambda model: list(model.transformer.h),
    ),
    "ResNet": ForeignModel(
        resnet,
        lambda generator: images(generator, 2, 24),
        ("*.convolution.weight",),
        lambda model: list(model.resnet.encoder.stages),
        sample_size=2,
    ),
    "ViT": ForeignModel(
        vit,
        lambda generator: images(generator, 1, 8),
        ("*_proj.weight", "*.fc?.weight"),
        lambda model: list(model.vit.layers),
    ),
    "MLP": ForeignModel(
        OddMLP,
        rows,
        ("enter.weight", "first.weight", "unused.weight", "middle.*.weight"),
        lambda model: [model.middle["up"], model.middle["down"]],
        sample_size=3,
        tensor_plan={"middle.up": ColwiseParallel, "middle.down": RowwiseParallel},
    ),
}
