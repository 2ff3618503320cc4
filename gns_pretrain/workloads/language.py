"""Language: a Llama, and sequences of tokens."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from gns_pretrain.config.schema import Config
from gns_pretrain.data.batches import Batches, inputs_and_targets, read_in_order
from gns_pretrain.data.mixture import Source
from gns_pretrain.data.settings import DataSettings, open_splits
from gns_pretrain.data.shards import joint_fingerprint
from gns_pretrain.errors import InputError, counted
from gns_pretrain.model import llama
from gns_pretrain.model.config import LlamaConfig, count_parameters
from gns_pretrain.model.flops import flops_per_token, peak_flops
from gns_pretrain.parallel.mesh import World
from gns_pretrain.parallel.sharding import parallelize
from gns_pretrain.tracking.console import short_number
from gns_pretrain.tracking.unit import TOKENS
from gns_pretrain.training.evaluate import mean_over
from gns_pretrain.training.workload import (
    Description,
    Evaluation,
    MicroBatch,
    Size,
    Workload,
)

FAR_LARGER = 2  # times the data's vocabulary, which padding it does not reach


class LanguageWorkload(Workload):
    """Next-token prediction; budget and axes count tokens."""

    trains_on = "text"
    refused = (
        "epochs",
        "sample_budget",
        "noise_scale.every_epochs",
        "evaluation.every_epochs",
        "evaluation.num_images",
    )

    def __init__(self, config: Config, data: DataSettings, model: LlamaConfig) -> None:
        self.refuse_settings_of_others(config)
        step_tokens = config.batch_size.initial * data.sequence_length
        if config.token_budget is None:
            raise InputError("token_budget has no value, by which a run on text ends; give it one")
        if config.token_budget < step_tokens:
            raise InputError(
                f"token_budget={config.token_budget} is less than one step's {step_tokens} tokens "
                f"(batch_size.initial={config.batch_size.initial} x data.sequence_length="
                f"{data.sequence_length}); raise it, or make the batch smaller"
            )
        self.config, self.data = config, data
        self.training, self.validation = open_splits(data)
        self.model: LlamaConfig = model.of_data(self.training.vocab_size)
        self.unit = replace(TOKENS, per_sample=data.sequence_length)
        self.budget = config.token_budget
        self.evaluate_every = config.evaluation.every_tokens
        self.parameter_kinds = llama.parameter_kind
        self.fingerprint = joint_fingerprint(
            split.fingerprint for split in (self.training, self.validation)
        )

    def check(self) -> None:
        """Check vocabulary, documents and the validation split."""
        config, data_vocab_size = self.config, self.validation.vocab_size
        if self.model.known_vocab_size < data_vocab_size:
            raise InputError(
                f"model.vocab_size={self.model.vocab_size} is smaller than the {data_vocab_size} "
                f"token ids of data.path={self.data.path}; use model.vocab_size={data_vocab_size} "
                "or null"
            )
        if self.data.document_mask:
            _ = self.validation.document_ids  # are there
        num_sequences = config.evaluation.num_sequences
        counts = self.validation.counts(num_sequences)
        for source, wanted in zip(self.validation.sources, counts, strict=True):
            there = source.tokens.num_sequences(self.data.sequence_length)
            if wanted > there and len(counts) == 1:
                raise InputError(
                    f"evaluation.num_sequences={num_sequences} is more than the "
                    f"{there} validation sequences of data.sequence_length="
                    f"{self.data.sequence_length} in data.path={self.data.path}; use at most "
                    f"{there}"
                )
            if not 1 <= wanted <= there:
                raise InputError(
                    f"evaluation.num_sequences={num_sequences} takes {counted(wanted, 'sequence')} "
                    f"of {source.name} by its weight in data.sources, whose validation split has "
                    f"{there:,}, and it needs at least 1; use {'more' if wanted < 1 else 'fewer'}"
                )

    def size(self) -> Size:
        """Counted from the shape alone.

        A micro-batch is its token ids and two bytes for each number that goes into a block (one
        block where activations are recomputed).
        """
        model = self.model
        counts = count_parameters(model)
        kv_dim = model.num_kv_heads * model.head_dim
        sides = [model.dim] * 2 + [kv_dim] * 2 + [min(model.dim, model.ffn_dim)] * 3
        tokens = self.config.micro_batch_size * self.data.sequence_length
        blocks = 1 if model.activation_checkpointing else model.num_layers
        per_token = 8 + 2 * model.dim * blocks // self.config.parallel.tensor_size
        return Size(
            parameters=counts.total,
            matrices=counts.in_blocks - 2 * model.dim * model.num_layers,  # two norms a block
            micro_batch=tokens * per_token,
            grams=8 * model.num_layers * sum(side**2 for side in sides),  # float64
            sample=f"data.sequence_length={self.data.sequence_length}",
        )

    @property
    def tokens_per_parameter(self) -> float:
        """By the parameters that compute on a token: an embedding apart from the output counts not.

        So the models of the law are counted, whose two are one.
        """
        return self.budget / count_parameters(self.model).with_output

    def describe(self, device: str) -> Description:
        """With the sources, and the parameters that no token of the data uses."""
        config, model = self.config, self.model
        parameters = count_parameters(model)
        sources = [
            f"{source.name} {weight:.3g} ({tokens_and_epochs(source, self.budget * weight)})"
            for source, weight in zip(self.training.sources, self.training.weights, strict=True)
        ]
        text = f"{self.data.path} of {', '.join(sources)}"
        if len(sources) == 1:
            alone = tokens_and_epochs(self.training.sources[0], self.budget)
            text = f"{self.data.path}, {alone}"
        if self.data.document_mask:
            text += "; attention within documents"
        initial, length = config.batch_size.initial, self.data.sequence_length
        notes = []
        if model.known_vocab_size >= FAR_LARGER * self.training.vocab_size:
            unused = (model.known_vocab_size - self.training.vocab_size) * model.dim
            unused *= 1 if model.tie_embeddings else 2
            notes.append(
                f"note: model.vocab_size={model.known_vocab_size:,}, but the data has "
                f"{self.training.vocab_size:,} token ids: {short_number(unused)} parameters are of "
                "ids that never come; model.vocab_size=null takes the data's"
            )
        return Description(
            model=f"{model.name}, {parameters.total:,} parameters ({parameters.in_blocks:,} in "
            f"blocks), {config.dtype_on(device)}",
            data=text,
            batch=f"{counted(initial, 'sequence')} x {length:,} = {initial * length:,} tokens",
            notes=notes,
        )

    def build_model(self, world: World) -> nn.Module:
        """Build the Llama."""
        document_ids = self.training.document_ids if self.data.document_mask else None
        return build_llama(self.config, self.model, world, document_ids=document_ids)

    def peak_speed(self, world: World) -> float | None:
        """Tokens/s at the bfloat16 peak of the GPUs."""
        if world.device.type != "cuda" or self.config.dtype_on("cuda") != "bfloat16":
            return None
        peak = peak_flops(torch.cuda.get_device_name(world.device))
        flops = flops_per_token(self.model, self.data.sequence_length)
        return peak and world.num_ranks * peak / flops

    def begin(self, world: World) -> None:
        """Read the first validation sequences of each source, as many as its weight gives it."""
        length = self.data.sequence_length
        counts = self.validation.counts(self.config.evaluation.num_sequences)
        self._validation = [
            read_in_order(source.tokens, length, 0, count).to(world.device)
            for source, count in zip(self.validation.sources, counts, strict=True)
        ]
        self._batches = Batches(
            self.training,
            sequence_length=length,
            seed=self.config.seed,
            device=world.device,
            rank=world.data_rank,
            num_ranks=world.num_data_ranks,
        )

    def micro_batches(
        self, cursor: int, *, batch_size: int, micro_batch_size: int
    ) -> Iterator[MicroBatch]:
        """Yield tokens and the tokens after them, int64 [micro_batch_size, L] each."""
        return map(
            inputs_and_targets,
            self._batches.micro_batches(
                cursor, batch_size=batch_size, micro_batch_size=micro_batch_size
            ),
        )

    def used_up(self, cursor: int) -> list[str]:
        """Name the sources of a mixture, or the training data."""
        names = self._batches.used_up(cursor)
        return names if len(self.training.sources) > 1 else ["the training data"] * len(names)

    def evaluate(self, model: nn.Module, *, chunk: int, world: World) -> Evaluation:
        """Take the loss; of a mixture the weighted mean over its sources, and that of each."""
        losses = [mean_loss(model, part, chunk=chunk, world=world) for part in self._validation]
        sources = self.validation.sources
        weighted = zip(self.validation.weights, losses, strict=True)
        of_sources = {f"loss/{s.name}": x for s, x in zip(sources, losses, strict=True)}
        return Evaluation(
            loss=sum(weight * loss for weight, loss in weighted),
            more=of_sources if len(losses) > 1 else {},
        )

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches.close()


def mean_loss(model: nn.Module, sequences: Tensor, *, chunk: int, world: World) -> float:
    """Mean negative log-likelihood per token, in nats; data-parallel ranks take chunks in turn.

    Args:
        model: parallelized.
        sequences: int64 [n, L + 1] on the device, the same on every rank.
        chunk: sequences in a forward pass.
        world: of the ranks.
    """
    chunks = map(inputs_and_targets, sequences.split(chunk))
    return mean_over(chunks, lambda each: model(*each)[None], world=world)[0]


def tokens_and_epochs(source: Source, budget: float) -> str:
    """Describe a source, of which a run takes `budget` tokens."""
    there = source.tokens.num_tokens
    return (
        f"{short_number(there)} tokens to train on; the budget of {short_number(budget)} is "
        f"{budget / there:.3g} epochs"
    )


def build_llama(
    config: Config,
    shape: LlamaConfig,
    world: World,
    *,
    document_ids: dict[str, int | None] | None = None,
) -> nn.Module:
    """Build the model with its first weights, compiled where asked, and parallelize it.

    Args:
        config: of the run.
        shape: with the vocabulary's size.
        world: of training.
        document_ids: bos_id and eos_id of the data, if documents are not to see each other.
    """
    with world.device:
        model = llama.Llama(shape)
    model.init_weights(config.seed)
    if document_ids is not None:
        model.separate_documents(**document_ids)
    if config.compiles_on(world.device.type):
        model.compile_blocks()
    dtype = getattr(torch, config.dtype_on(world.device.type))
    return parallelize(model, world, compute_dtype=dtype)
