"""A GPU that is not there: what a step would do to it, without computing anything.

`FakeGPU` records what it is told of (`benchmarks/interception.py`):

    kernels      what each operator reads and writes, its FLOPs, and how many launches it takes
    memory       which storages live, what for, and the largest sum of them
    collectives  their bytes, under NCCL's rules for streams
    waits        of the host for the device
    races        accesses to one storage that no stream event orders (vector clocks)

Not seen: temporaries inside one kernel, memory of the libraries (cuBLAS, NCCL) and what the caching
allocator keeps beside it.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from types import FrameType, SimpleNamespace
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

DEVICE = torch.device("cuda", 0)
DEFAULT_STREAM = "default"

# Who an operator is for, by the innermost of these that called it: a part of a file's path, the
# name of a function in it (any, if empty), the part of the step, and what the memory holds.
CALLERS = (
    ("/noise_scale/", "", "measurement", "measurement"),
    ("/model/loss.py", "", "loss", "logits"),
    ("/model/", "", "forward", "activations"),
    ("/parallel/collectives.py", "clip_gradient_norm", "clipping", "optimizer"),
    ("/gns_pretrain/optim/", "", "optimizer", "optimizer"),
    ("/torch/optim/", "", "optimizer", "optimizer"),
    ("/_fully_shard/", "foreach_reduce", "FSDP2's copies", "gradients"),
    ("/_fully_shard/", "foreach_all_gather", "FSDP2's copies", "gathered weights"),
    ("/_fully_shard/", "foreach_all_gather_copy_out", "FSDP2's copies", "gathered weights"),
    ("/_fully_shard/", "", "FSDP2's copies", "gathered weights"),
    ("/training/step.py", "", "backward", "gradients"),
)


@dataclass(frozen=True)
class Kernel:
    """An operator on the device; one of several launches where it is multi-tensor."""

    part: str  # of the step
    name: str
    bytes: int  # read and written
    flops: int = 0
    unit: str = "float32"  # what computes: a dtype's matmuls, "attention" or "factorization"
    launches: int = 1


@dataclass(frozen=True)
class Collective:
    """A collective among the ranks of a group."""

    part: str
    kind: str
    sent: float  # bytes that leave this rank
    ranks: tuple[int, ...]


@dataclass
class Recording:
    """What a step did."""

    kernels: list[Kernel] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)  # of the host, by where
    races: Counter[str] = field(default_factory=Counter)
    peak: int = 0  # bytes
    held_at_peak: Counter[str] = field(default_factory=Counter)  # bytes, by what they hold


class Stream:
    """Work in one order; `clock[s]` is the last work of stream s that is done before its next."""

    def __init__(self, gpu: "FakeGPU", name: str) -> None:
        self.gpu, self.name = gpu, name
        self.clock: Counter[str] = Counter()

    def wait_for(self, clock: Counter[str] | None) -> None:
        if clock is not None:
            self.clock |= clock  # the larger of each

    def wait_stream(self, other: "Stream") -> None:
        self.wait_for(other.clock)

    def wait_event(self, event: "Event") -> None:
        self.wait_for(event.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        return (event or Event(self.gpu)).record(self)

    def synchronize(self) -> None:
        self.gpu.wait("stream.synchronize")

    def has_done(self, stream: str, time: int) -> bool:
        return self.clock[stream] >= time

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class Event:
    """A stream's clock at one moment."""

    def __init__(self, gpu: "FakeGPU", **_: Any) -> None:
        self.gpu = gpu
        self.clock: Counter[str] | None = None

    def record(self, stream: Stream | None = None) -> "Event":
        self.clock = Counter((stream or self.gpu.stream).clock)
        return self

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.gpu.stream).wait_for(self.clock)

    def synchronize(self) -> None:
        self.gpu.wait("event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: "Event") -> float:
        return 0.0


class Storage:
    """A storage on the device: how large, what for, and who has accessed it last."""

    def __init__(self, size: int, holder: str, stream: str) -> None:
        self.size, self.holder = size, holder
        self.stream = stream  # whose memory it is
        self.written: tuple[str, int] | None = None
        self.read: dict[str, int] = {}

    def late_for(self, stream: Stream, *, writing: bool) -> list[str]:
        """Return the streams whose access is not known to be over for the next work of `stream`."""
        late = [self.written[0]] if self.written and not stream.has_done(*self.written) else []
        if writing:
            late += [name for name, time in self.read.items() if not stream.has_done(name, time)]
        return late


class Work:
    """A collective in flight; NCCL keeps its tensors until it is waited for."""

    def __init__(self, gpu: "FakeGPU", stream: Stream, tensors: list[Tensor]) -> None:
        self.gpu, self.tensors = gpu, tensors
        self.clock = Counter(stream.clock)

    def wait(self, *_: Any) -> bool:
        self.gpu.stream.wait_for(self.clock)
        self.tensors = []
        return True

    def is_completed(self) -> bool:
        return True


class FakeGPU:
    """Records what happens on the device; `recording` is that of the current step."""

    def __init__(self) -> None:
        self.recording = Recording()
        self.streams: dict[str, Stream] = {}
        self._current = [self.stream_named(DEFAULT_STREAM)]
        self._storages: dict[int, tuple[ref[Any], Storage]] = {}
        self._held: Counter[str] = Counter()
        self._holder: str | None = None
        # Freed with work under way, by the stream whose memory it is.
        self._returned: dict[str, list[Storage]] = defaultdict(list)

    # Streams.

    @property
    def stream(self) -> Stream:
        return self._current[-1]

    def stream_named(self, name: str) -> Stream:
        return self.streams.setdefault(name, Stream(self, name))

    @contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[None]:
        self._current.append(stream or self.stream)
        try:
            yield
        finally:
            self._current.pop()

    def handle(self) -> SimpleNamespace:
        """Return what FSDP2, DeviceMesh and the noise scale ask of `torch.cuda`."""
        return SimpleNamespace(
            Stream=lambda *_, **__: self.stream_named(f"side {len(self.streams)}"),
            Event=partial(Event, self),
            current_stream=lambda *_: self.stream,
            stream=self.on_stream,
            current_device=lambda: DEVICE.index,
            device_count=lambda: 1,
            is_initialized=lambda: True,
            set_device=lambda _: None,
        )

    # Memory.

    @contextmanager
    def holding(self, holder: str) -> Iterator[None]:
        """Label all memory that is taken within."""
        before, self._holder = self._holder, holder
        try:
            yield
        finally:
            self._holder = before

    def storage_of(self, tensor: Tensor, holder: str = "other") -> Storage:
        """Return the storage's entry; it is new memory if there is none."""
        untyped = tensor.untyped_storage()
        known = self._storages.get(untyped._cdata)
        if known is not None and known[0]() is untyped:
            return known[1]
        storage = Storage(0, self._holder or holder, self.stream.name)
        key = untyped._cdata

        def freed(reference: Any) -> None:
            self._resize(storage, 0)
            if self._storages[key][0] is reference:
                del self._storages[key]

        self._storages[key] = (ref(untyped, freed), storage)
        self._resize(storage, untyped.nbytes())
        return storage

    def resized(self, tensor: Tensor) -> None:
        """Follow a storage that was emptied or filled again."""
        self._resize(self.storage_of(tensor, "gathered weights"), tensor.untyped_storage().nbytes())

    def _resize(self, storage: Storage, size: int) -> None:
        if storage.size and not size:
            if storage.late_for(self.streams[storage.stream], writing=True):
                self._returned[storage.stream].append(storage)
        elif size and not storage.size:
            storage.stream = self.stream.name
            storage.written, storage.read = None, {}
            self._reuse(storage)
        self._held[storage.holder] += size - storage.size
        storage.size = size
        self.reach(0)

    def _reuse(self, storage: Storage) -> None:
        """New memory may be what a stream has returned while others still worked on it."""
        returned = self._returned[storage.stream]
        stream = self.streams[storage.stream]
        returned[:] = [old for old in returned if old.late_for(stream, writing=True)]
        for old in returned:
            late = ", ".join(old.late_for(stream, writing=True))
            self.recording.races[f"{old.holder} freed under {late}"] += 1

    def reach(self, more: int, holder: str = "") -> None:
        """Note the memory held now, and `more` bytes that a kernel takes for a moment."""
        total = self._held.total() + more
        if total > self.recording.peak:
            self.recording.peak = total
            self.recording.held_at_peak = self._held + Counter({holder: more})

    # Work.

    def start_recording(self) -> None:
        """Begin a step."""
        self.recording = Recording()
        self.reach(0)

    def wait(self, what: str) -> None:
        self.recording.waits[f"{what} in {location()}"] += 1

    def access(
        self, stream: Stream, reads: Iterable[Tensor], writes: Iterable[Tensor], what: str
    ) -> None:
        """Put work on a stream; what it touches must be ordered after the work of others."""
        stream.clock[stream.name] += 1
        now = stream.clock[stream.name]
        read = {id(s): s for s in map(self.storage_of, reads)}
        written = {id(s): s for s in map(self.storage_of, writes)}
        for storage in {**read, **written}.values():
            for late in storage.late_for(stream, writing=id(storage) in written):
                race = f"{what} on {stream.name} while {late} works on {storage.holder}"
                self.recording.races[race] += 1
        for storage in read.values():
            storage.read[stream.name] = now
        for storage in written.values():
            storage.written, storage.read = (stream.name, now), {}

    def collective(
        self,
        kind: str,
        sent: float,
        reads: list[Tensor],
        writes: list[Tensor],
        group: dist.ProcessGroup,
        async_op: bool,
    ) -> Work | None:
        """Put a collective on its group's own stream, or where it blocks on the current one."""
        ranks = tuple(dist.get_process_group_ranks(group))
        part, _ = caller()
        self.recording.collectives.append(Collective(part, kind, sent, ranks))
        stream = self.stream
        if async_op:
            stream = self.stream_named(f"NCCL {group.group_name}")
            stream.wait_stream(self.stream)
        self.access(stream, reads, writes, kind)
        return Work(self, stream, reads + writes) if async_op else None


@cache
def rule_of(filename: str, function: str) -> tuple[str, str] | None:
    for path, name, part, holder in CALLERS:
        if path in filename and name in ("", function):
            return part, holder
    return None


def caller() -> tuple[str, str]:
    """Return the part of the step that the current operator is for, and what its memory holds."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        rule = rule_of(frame.f_code.co_filename, frame.f_code.co_name)
        if rule is not None:
            return rule
        frame = frame.f_back
    return "other", "other"


def location() -> str:
    """Return the innermost function of the package that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        _, found, path = frame.f_code.co_filename.rpartition("/gns_pretrain/")
        if found:
            return f"{path}: {frame.f_code.co_name}"
        frame = frame.f_back
    return "other code"
