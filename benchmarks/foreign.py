"""Models of transformers, about as large as `tiny`, in a loop that knows nothing of the trainer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from gns_pretrain.noise_scale.meter import NoiseMeter, Reading
from gns_pretrain.parallel.mesh import World

VOCABULARY, WIDTH, LAYERS, HEADS, CLASSES, PIXELS = 4096, 128, 4, 4, 10, 32
# transformers is optional, takes seconds to import, and is imported where a model is built.


def llama(sequence_length: int) -> tuple[nn.Module, list[nn.Module]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=sequence_length,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    return model, list(model.model.layers)


def gpt2(sequence_length: int) -> tuple[nn.Module, list[nn.Module]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=sequence_length,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    return model, list(model.transformer.h)


def resnet(_: int) -> tuple[nn.Module, list[nn.Module]]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=CLASSES,
    )
    model = ResNetForImageClassification(config)
    return model, list(model.resnet.encoder.stages)


# By name: a model and the modules that FSDP2 wraps.
FOREIGN_MODELS: dict[str, Callable[[int], tuple[nn.Module, list[nn.Module]]]] = {
    "llama": llama,
    "gpt2": gpt2,
    "resnet": resnet,
}


class ForeignLoop:
    """Accumulated micro-batches of random data and AdamW; FSDP2 on several ranks.

    Args:
        accumulation: micro-batches of this rank.
        micro_batch_size: sequences or images.
        sequence_length: tokens.
    """

    def __init__(
        self,
        name: str,
        world: World,
        *,
        accumulation: int,
        micro_batch_size: int,
        sequence_length: int,
    ) -> None:
        torch.manual_seed(0)  # the same weights on every rank
        self.model, units = FOREIGN_MODELS[name](sequence_length)
        self.model.to(world.device)
        if world.num_ranks > 1:
            for unit in [*units, self.model]:
                fully_shard(unit, mesh=world.mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch_size = accumulation * micro_batch_size * world.num_ranks
        self.batch = [
            {key: tensor.to(world.device) for key, tensor in inputs.items()}
            for inputs in (
                random_inputs(name, micro_batch_size, sequence_length) for _ in range(accumulation)
            )
        ]

    def step(self, meter: NoiseMeter, number: int = 1) -> list[Reading]:
        """Take one optimizer step, which the meter measures by its number, if at all."""
        with meter.step(number):
            for index, inputs in enumerate(self.batch, 1):
                if isinstance(self.model, FSDPModule):
                    self.model.set_requires_gradient_sync(index == len(self.batch))
                with meter.sample():
                    (self.model(**inputs).loss / len(self.batch)).backward()
        readings = meter.read(batch_size=self.batch_size)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return readings


def random_inputs(name: str, count: int, sequence_length: int) -> dict[str, Tensor]:
    if name == "resnet":
        pixels = torch.randn(count, 3, PIXELS, PIXELS)
        return {"pixel_values": pixels, "labels": torch.randint(CLASSES, (count,))}
    ids = torch.randint(VOCABULARY, (count, sequence_length))
    return {"input_ids": ids, "labels": ids}
