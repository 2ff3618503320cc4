"""Loss of trained models on any text: behind `gns-pretrain evaluate`.

A text is one line of tokens, as in training: its documents, with bos and eos around each where the
model's data has them, end to end. It is cut into sequences of L tokens, each predicting the token
after it; the last one may be shorter. So every token but the first is predicted once, from at most
L - 1 before it.

    loss           nats / tokens           over all predicted tokens, bos and eos among them
    perplexity     exp(loss)
    bits per byte  nats / ln 2 / bytes     bytes of UTF-8 that the predicted tokens stand for

bos and eos stand for no bytes, but what they cost counts: where a document ends is information.
With --num-sequences only the first so many whole sequences count, as in the evaluation of a run.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from gns_pretrain.data.batches import read_in_order
from gns_pretrain.data.prepare.corpus import LocalFiles, find_files, parse_texts
from gns_pretrain.data.settings import MIXTURE
from gns_pretrain.data.shards import (
    CorpusMeta,
    ShardMeta,
    TokenShards,
    checked_tokenizer,
    read_meta,
    token_dtype,
)
from gns_pretrain.data.tokenization import DocumentEncoder, bytes_of_tokens, vocabulary_size
from gns_pretrain.errors import InputError, needs, one_line
from gns_pretrain.fields import About, Settings, at_least, one_of, path_name
from gns_pretrain.launch.ranks import rank_info_from
from gns_pretrain.model.huggingface import ExportedText, to_transformers, transformers_tokenizer
from gns_pretrain.model.llama import Llama
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, World, joined, pick_device
from gns_pretrain.parallel.sharding import parallelize
from gns_pretrain.system.remote import folder_at
from gns_pretrain.training.checkpoint_reader import checkpoint_folders
from gns_pretrain.training.trained_model import TrainedModel, checkpoints_of
from gns_pretrain.workloads.language import mean_loss

LARGEST_EXPONENT = 700.0  # of a float
ROUNDS = 16  # forward passes of each rank between two reads of the data


@dataclass
class EvaluationRequest(Settings):
    """The options of `gns-pretrain evaluate`."""

    section: ClassVar[str] = "--"

    checkpoint: Annotated[
        list[str],
        path_name(),
        About("run directories, step_* folders or their URLs, Hugging Face Llama folders"),
    ]
    data: Annotated[
        str | None,
        path_name(),
        About("token-shard folder, or embedded (default: the run's own, without --text, --tasks)"),
    ] = None
    split: Annotated[
        str | None, About("of the shards, as train (default: the validation split)")
    ] = None
    text: Annotated[
        list[str], path_name(), About("text files or quoted globs, as prepare-data --train reads")
    ] = field(default_factory=list)
    all: Annotated[bool, About("all checkpoints of a run directory, not its newest alone")] = False
    num_sequences: Annotated[
        int | None, at_least(1), About("the first so many sequences (default: all)")
    ] = None
    sequence_length: Annotated[
        int | None,
        at_least(1),
        About("tokens of a sequence (default: the run's; of a Hugging Face model 2048 at most)"),
    ] = None
    batch_size: Annotated[int, at_least(1), About("sequences in a forward pass")] = 8
    tasks: Annotated[
        list[str], About("tasks of lm-evaluation-harness, on one process (extra eval)")
    ] = field(default_factory=list)
    include_path: Annotated[Path | None, path_name(), About("folder of further tasks' YAML")] = None
    num_fewshot: Annotated[int | None, at_least(0), About("examples before each question")] = None
    limit: Annotated[int | None, at_least(1), About("the first so many questions of a task")] = None
    tokenizer: Annotated[
        str | None, About("tokenizer.json or a name on the hub (default: the data's own)")
    ] = None
    run: Annotated[
        Path | None, path_name(), About("run directory of a checkpoint that lies elsewhere")
    ] = None
    precision: Annotated[
        str, one_of("float32", "bfloat16"), About("of the computation; runs on GPUs take bfloat16")
    ] = "float32"
    device: Annotated[
        str, one_of("auto", "cpu", "cuda"), About("auto takes a GPU where there is one")
    ] = "auto"
    format: Annotated[
        str, one_of("text", "json"), About("json: an array, an object for each checkpoint")
    ] = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = [name for names in self.tasks for name in names.split(",") if name]
        if self.data is not None and self.text:
            raise InputError("--data and --text exclude each other; give one")
        if self.data is not None and Path(self.data).is_file():
            raise InputError(f"--data={self.data} is no folder of shards; --text evaluates a file")

    @property
    def takes_loss(self) -> bool:
        """Whether a text is evaluated: named, or the run's own where nothing else is asked for."""
        return bool(self.data is not None or self.text or not self.tasks)


@dataclass(frozen=True)
class Evaluation:
    """What was found of one checkpoint."""

    checkpoint: str
    step: int | None  # None for a Hugging Face folder, as the next
    tokens_seen: int | None
    text: str | None = None  # what was read; None with tasks alone, as what follows
    tokens: int | None = None  # predicted
    bytes: int | None = None  # None where no tokenizer says what the tokens stand for
    loss: float | None = None  # nats a token
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)  # metrics of each, as reported

    @property
    def name(self) -> str:
        """The run of a checkpoint that lies in one, else its folder."""
        folder = Path(self.checkpoint)
        return folder.name if self.step is None else folder.parent.parent.name or folder.name


def models_of(request: EvaluationRequest) -> Iterator[TrainedModel]:
    """Find each checkpoint that is asked for; with --all a run's from the oldest on."""
    for place in request.checkpoint:
        folder = folder_at(place, "--checkpoint")
        steps = checkpoint_folders(checkpoints_of(folder)) if request.all else []
        for each in reversed(steps or [folder]):
            yield TrainedModel.find(each, run=request.run or (folder if steps else None))


def evaluate(request: EvaluationRequest, ranks: RankInfo | None = None) -> list[Evaluation]:
    """Evaluate one checkpoint after the other, on this process or on torchrun's or srun's ranks.

    Args:
        ranks: this process among them, where the environment does not say so.

    Returns:
        What was found of each, on the first rank; nothing on the others.

    Raises:
        InputError: a checkpoint, text or task that cannot be read, or do not fit each other.
    """
    ranks = ranks or rank_info_from(os.environ) or RankInfo()
    if request.tasks and ranks.num_ranks > 1:
        raise InputError(
            f"--tasks runs on one process, not on {ranks.num_ranks}; leave out torchrun"
        )
    device = pick_device(request.device, ranks.local_rank)
    texts: dict[Path, Text] = {}
    evaluations = []
    with joined(ranks, ParallelSettings(), device) as world:
        for trained in models_of(request):
            model = trained.load().to(device)
            found: dict[str, Any] = {}
            if request.tasks:
                exported = trained.text(tokenizer=request.tokenizer)
                found["tasks"] = task_metrics(model, exported, request)
            if request.takes_loss:
                key = trained.run or trained.folder
                if key not in texts:
                    texts = {key: Text.find(request, trained)}  # one at a time is kept
                found |= texts[key].evaluate(model, request, world, name=str(trained.folder))
            position = trained.position
            place = (position.step, position.tokens) if position else (None, None)
            evaluations.append(Evaluation(str(trained.folder), *place, **found))
    return evaluations if ranks.rank == 0 else []


@dataclass(frozen=True)
class Text:
    """A text in a model's tokens."""

    name: str
    tokens: TokenShards
    sequence_length: int
    token_bytes: np.ndarray | None  # of each id; None without a tokenizer

    @classmethod
    def find(cls, request: EvaluationRequest, trained: TrainedModel) -> "Text":
        """Open the shards, or tokenize the files, that a model is to be evaluated on."""
        length = request.sequence_length or trained.default_length
        if request.text:
            text = trained.text(tokenizer=request.tokenizer)
            tokens = tokens_of_files(request.text, text)
            counts = bytes_of_tokens(text.tokenizer, tokens.vocab_size, document_ids(text))
            return cls(" ".join(request.text), tokens, length, counts)
        folder, split, shown = trained.data_folder(request.data), "validation", request.data
        if request.data is None and trained.data is not None:
            if trained.data.path == MIXTURE:
                raise InputError(
                    f"{trained.folder} was trained on a mixture; name one of its sources with "
                    "--data, or give --text"
                )
            split, shown = trained.data.validation_split, trained.data.path
        split = request.split or split
        tokens = TokenShards.open(folder, split, setting="--split")
        meta = read_meta(folder)
        name, path = f"{split} of {shown}", checked_tokenizer(folder, meta)
        if path is None:
            return cls(name, tokens, length, None)
        tokenizer = Tokenizer.from_file(str(path))
        if trained.is_hf or trained.data is not None:
            own = trained.text(tokenizer=request.tokenizer).tokenizer
            if own is not None and own.get_vocab() != tokenizer.get_vocab():
                raise InputError(
                    f"{folder} was prepared with another tokenizer than that of {trained.folder}; "
                    "give the text itself with --text, or prepare it with the model's tokenizer"
                )
        counts = bytes_of_tokens(tokenizer, tokens.vocab_size, document_ids(meta))
        return cls(name, tokens, length, counts)

    def evaluate(
        self, llama: Llama, request: EvaluationRequest, world: World, *, name: str
    ) -> dict[str, Any]:
        """Evaluate a model, which is parallelized over the ranks; return fields of Evaluation."""
        if llama.config.known_vocab_size < self.tokens.vocab_size:
            raise InputError(
                f"{name} has a vocabulary of {llama.config.known_vocab_size}, but {self.name} "
                f"holds {self.tokens.vocab_size} token ids; use text in the model's own tokens"
            )
        available = self.tokens.num_sequences(self.sequence_length)
        if (request.num_sequences or 0) > available or self.tokens.num_tokens < 2:
            raise InputError(
                f"{self.name} has {self.tokens.num_tokens:,} tokens, {available:,} sequences of "
                f"{self.sequence_length}; use more text, or a lower --num-sequences"
            )
        model = parallelize(llama, world, compute_dtype=getattr(torch, request.precision))
        nats, tokens, num_bytes = 0.0, 0, 0
        for sequences in self._blocks(request.num_sequences, request.batch_size * world.num_ranks):
            on_device = sequences.to(world.device)
            loss = mean_loss(model, on_device, chunk=request.batch_size, world=world)
            targets = sequences[:, 1:].numpy()
            nats, tokens = nats + loss * targets.size, tokens + targets.size
            if self.token_bytes is not None:
                num_bytes += int(self.token_bytes[targets].sum())
        if not math.isfinite(nats):
            raise InputError(f"{name} gives a loss that is not finite; use an earlier checkpoint")
        loss = nats / tokens
        return {
            "text": self.name,
            "tokens": tokens,
            "bytes": num_bytes or None,
            "loss": loss,
            "perplexity": math.exp(loss) if loss < LARGEST_EXPONENT else None,
            "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
        }

    def _blocks(self, num_sequences: int | None, together: int) -> Iterator[Tensor]:
        """Read the sequences in order, int64 [n, L + 1], then the shorter one that is left."""
        length, tokens = self.sequence_length, self.tokens
        count = num_sequences or tokens.num_sequences(length)
        for start in range(0, count, together * ROUNDS):
            yield read_in_order(tokens, length, start, min(start + together * ROUNDS, count))
        if num_sequences is None and count * length + 1 < tokens.num_tokens:
            rest = tokens.read(count * length, tokens.num_tokens).astype(np.int64)
            yield torch.from_numpy(rest)[None]


def document_ids(around: ExportedText | CorpusMeta) -> set[int]:
    """The ids of bos and eos that there are."""
    return {token_id for token_id in (around.bos_id, around.eos_id) if token_id is not None}


def tokens_of_files(patterns: list[str], text: ExportedText) -> TokenShards:
    """Tokenize documents as prepare-data does, end to end in the order of their files' names."""
    if text.tokenizer is None:
        raise InputError("--text needs the model's tokenizer; name it with --tokenizer")
    files = LocalFiles(find_files(patterns, "--text"))
    vocab_size = vocabulary_size(text.tokenizer)
    dtype = token_dtype(vocab_size)
    encoder = DocumentEncoder(text.tokenizer, dtype=dtype, bos_id=text.bos_id, eos_id=text.eos_id)
    parts = [encoder.encode(parse_texts(batch)[0])[0] for batch in files.batches(None)]
    tokens = np.concatenate(parts)
    meta = CorpusMeta(dtype.name, vocab_size, (ShardMeta("--text", "text", tokens.size, ""),))
    return TokenShards(Path(), meta, [tokens], "text")


def task_metrics(
    model: Llama, text: ExportedText, request: EvaluationRequest
) -> dict[str, dict[str, Any]]:
    """Take tasks of lm-evaluation-harness; return each one's metrics by the harness's names."""
    with needs("eval", "--tasks needs lm-evaluation-harness"):
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    if text.tokenizer is None:
        raise InputError("--tasks needs the model's tokenizer; name it with --tokenizer")
    folder = request.include_path
    manager = TaskManager(include_path=str(folder) if folder else None)
    if unknown := [name for name in request.tasks if name not in manager.all_tasks]:
        raise InputError(
            f"--tasks={unknown[0]} is no task of lm-evaluation-harness; `lm-eval ls tasks` lists "
            "them, and --include-path adds a folder of your own"
        )
    harness = HFLM(
        pretrained=to_transformers(model, text, "--tasks needs transformers"),
        tokenizer=transformers_tokenizer(text),
        batch_size=request.batch_size,
        max_length=text.max_positions,
        add_bos_token=text.bos_id is not None,
    )
    try:
        results = lm_eval.simple_evaluate(
            model=harness,
            tasks=request.tasks,
            task_manager=manager,
            num_fewshot=request.num_fewshot,
            limit=request.limit,
            log_samples=False,
        )
    except OSError as error:  # of datasets and the hub's client
        raise InputError(
            f"--tasks={','.join(request.tasks)}: data cannot be read ({one_line(error)}); fetch it "
            "once on a machine with a network: datasets keeps it under HF_HOME"
        ) from error
    found: dict[str, dict[str, Any]] = results["results"]
    return found
