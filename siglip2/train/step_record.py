"""What one training step allocates, sends and multiplies, seen op by op.

The same recorder watches a step on real tensors, and one on fake tensors (shapes without memory)
over a fake process group; the tests hold the two against each other.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .flops import FLOPS
from .parallel import unwrapped
from .step import TrainStep
from .task import Siglip2Task

VISION, TEXT, DECODER = "vision tower", "text tower", "captioning decoder"
STAGE = "self-distillation"
CASTS, LOSS = "weights cast for the towers", "loss"
TOWERS = "towers"

_aten = torch.ops.aten
_sigmoid_loss = torch.ops.siglip2.sigmoid_loss
_linear_cross_entropy = torch.ops.siglip2.linear_cross_entropy
_KINDS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",  # of DTensor
    "send": "send",
}
_IDS, _RING = "row counts and ids", "texts and their gradients (ring)"
_TEXTS = {"all-gather": "text embeddings", "reduce-scatter": "text gradients"}
LOSS_TRAFFIC = (_IDS, _RING, *_TEXTS.values())


class Collective(NamedTuple):
    """One message exchange, as this rank takes part in it."""

    what: str  # whose it is
    kind: str
    num_bytes: int  # of the larger side: gathered, to be scattered, reduced or sent

    def sent_bytes(self, world_size: int) -> int:
        """What this rank sends if ranks form a ring, as NCCL does for large messages."""
        times = {"send": world_size, "all-reduce": 2 * (world_size - 1)}
        return self.num_bytes * times.get(self.kind, world_size - 1) // world_size


class StepRecord(NamedTuple):
    saved_bytes: Mapping[str, int]  # of each part, most that waits for a backward at a time
    recomputed_bytes: int  # of one block, in the backward of a checkpointed tower
    loss_bytes: int  # most that lives at a time of what is made outside the towers
    collectives: list[Collective]
    flops: Mapping[str, int]  # LOSS: of the sigmoid loss; DECODER, its head too; TOWERS: the rest
    ready: list[nn.Parameter]  # in the order their gradients were complete


def record_step(
    step: TrainStep,
    batch: Mapping[str, Any],
    *,
    known: Iterable[tuple[Tensor, list]] = (),
) -> StepRecord:
    """Run `step(batch)` and watch it. Memory is counted on an unwrapped task or DDP only.

    Counted are storages, once: those saved for the backward, weights and the batch aside; inputs of
    checkpointed blocks; and all that is made between the towers. Scratch memory inside an op
    is not seen.

    Args:
        known: Fake tensors of the batch whose numbers the host asks for, with all their elements.
    """
    task = unwrapped(step.task)
    recorder = Recorder(p for p in task.parameters() if not isinstance(p, DTensor))
    for x, numbers in known:
        recorder.know(x, numbers)
    with recorder.watching(task), recorder, saved_tensors_hooks(recorder.pack, lambda x: x):
        step(batch)
    recomputed = [_bytes_of_block(*called) for called in recorder.checkpointed]
    return StepRecord(
        {part: recorder.saved.peak[part] for part in (VISION, TEXT, DECODER, STAGE, CASTS)},
        max(recomputed, default=0),
        recorder.alive.peak[LOSS],
        recorder.collectives,
        recorder.flops,
        list(recorder.ready),
    )


class Recorder(TorchDispatchMode):
    """Collectives, FLOPs and storages of the ops that run inside.

    On fake tensors it answers for the numbers that the host asks for: those that came from the
    host, or from ranks that hold the same; False and 0 for all that would have been computed.
    """

    def __init__(self, weights: Iterable[Tensor] = ()):
        super().__init__()
        self.collectives: list[Collective] = []
        self.flops: Counter[str] = Counter()
        self.alive, self.saved = _Storages(), _Storages()
        self.phase = LOSS
        self.ready: dict[nn.Parameter, None] = {}
        self.checkpointed: list[tuple[nn.Module, Tensor, Any]] = []  # a block of each tower, called
        self._weights = {_key(p) for p in weights}
        self._host: dict[int, tuple[weakref.ref, list]] = {}  # forgotten with the storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # comes back as ops on this rank's shards, and collectives
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._host_value(args[0])
        out = func(*args, **(kwargs or {}))
        if func is _aten.lift_fresh.default and isinstance(out, FakeTensor):
            with torch._C._DisableTorchDispatch():
                self.know(out, args[0].flatten().tolist())
        elif func.namespace in ("c10d", "_c10d_functional"):
            self._record_collective(func, args)
        elif count := FLOPS.get(func._overloadpacket):
            self.flops[self._doer(func._overloadpacket)] += count(
                *args, **(kwargs or {}), out_val=out
            )
        is_cast = func is _aten._to_copy.default and _key(args[0]) in self._weights
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _key(x) not in self._weights:
                self.alive.add(x, CASTS if is_cast else self.phase)
        return out

    def _doer(self, op: Any) -> str:
        if op is _sigmoid_loss:
            return LOSS
        if self.phase == STAGE:
            return STAGE
        is_decoder = self.phase == DECODER or op is _linear_cross_entropy
        return DECODER if is_decoder else TOWERS

    def pack(self, x: Tensor) -> Tensor:
        """Of `saved_tensors_hooks`. What was made before the step is the batch."""
        part = self.alive.part_of(x)
        if part is not None:
            self.saved.add(x, part)
        return x

    @contextmanager
    def watching(self, task: Siglip2Task) -> Iterator[None]:
        """Tell the towers' work from what is between them; see inputs kept and gradients done."""
        model, decoder = task.model, None if task.locca is None else task.locca.decoder
        trained = [p for p in task.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(self._is_ready) for p in trained]
        for stack in (model.vision.encoder, model.text.encoder, decoder):
            if stack is not None and stack.grad_checkpointing:
                hooks += [b.register_forward_pre_hook(self._keep_input) for b in stack.blocks]
                hooks.append(stack.blocks[0].register_forward_pre_hook(self._note_call))
        calls = [(model, "forward_vision", VISION), (model, "encode_text", TEXT)]
        calls += [] if decoder is None else [(decoder, "forward", DECODER)]
        if task.ssl is not None:
            calls += [(task.ssl, "prepare", STAGE), (task.ssl, "forward", STAGE)]
            calls.append((model.vision, "forward", VISION))  # on views, too
        for owner, name, part in calls:
            setattr(owner, name, self._in_phase(getattr(owner, name), part))
        try:
            yield
        finally:
            for owner, name, _ in calls:
                delattr(owner, name)
            for hook in hooks:
                hook.remove()

    def _is_ready(self, parameter: nn.Parameter) -> None:
        self.ready.pop(parameter, None)  # an earlier part of the batch
        self.ready[parameter] = None

    def _keep_input(self, block: nn.Module, args: tuple) -> None:
        # What a checkpoint keeps is no saved tensor: it holds the block's arguments.
        if torch.is_grad_enabled():
            self.pack(args[0])

    def _note_call(self, block: nn.Module, args: tuple) -> None:
        if all(block is not other for other, *_ in self.checkpointed):
            self.checkpointed.append((block, args[0].detach(), args[1:]))

    def _in_phase(self, encode: Callable, part: str) -> Callable:
        def enter(*_) -> None:
            self.phase = part

        def encode_in_phase(*args, **kwargs):
            before = self.phase
            enter()
            out = encode(*args, **kwargs)
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and x.requires_grad:
                    x.register_hook(enter)
            self.phase = before
            return out

        return encode_in_phase

    def _record_collective(self, func, args: tuple) -> None:
        name = func._overloadpacket.__name__
        if name not in _KINDS:  # waits, and the other end of a send
            return
        sides = [[x for x in tree_leaves(arg) if isinstance(x, Tensor)] for arg in args]
        tensors = max(sides, key=lambda side: sum(x.nbytes for x in side))
        what = _whose(_KINDS[name], tensors[0].dtype)
        self.collectives.append(Collective(what, _KINDS[name], sum(x.nbytes for x in tensors)))
        if name == "_allgather_base_" and (known := self._host.get(_key(args[1]))):
            self.know(args[0], known[1] * (args[0].numel() // args[1].numel()))

    def know(self, x: Tensor, values: list) -> None:
        """The host may ask for the elements of `x`, fake: they are `values`, in order."""
        storage, key = x.untyped_storage(), _key(x)

        def dropped(ref: weakref.ref) -> None:
            if self._host[key][0] is ref:
                del self._host[key]

        self._host[key] = weakref.ref(storage, dropped), values

    def _host_value(self, x: Tensor) -> float | int | bool:
        if found := self._host.get(_key(x)):
            return found[1][x.storage_offset()]
        return False if x.dtype is torch.bool else 0


class _Storages:
    """Bytes of the storages added that still live, by part, and the most there were."""

    def __init__(self):
        self.peak: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self._parts: dict[int, tuple[str, weakref.ref]] = {}

    def add(self, x: Tensor, part: str) -> None:
        storage, key = x.untyped_storage(), _key(x)
        if key in self._parts:
            return
        num_bytes = storage.nbytes()

        def dropped(_) -> None:
            del self._parts[key]
            self._now[part] -= num_bytes

        self._parts[key] = part, weakref.ref(storage, dropped)
        self._now[part] += num_bytes
        self.peak[part] = max(self.peak[part], self._now[part])

    def part_of(self, x: Tensor) -> str | None:
        found = self._parts.get(_key(x))
        return found and found[0]


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes_of_block(block: nn.Module, x: Tensor, others: tuple) -> int:
    recorder = Recorder(block.parameters())
    x = x.detach().requires_grad_()
    with recorder, saved_tensors_hooks(recorder.pack, lambda x: x):
        out = block(x, *others)
    del out
    return recorder.saved.peak.total()


def _whose(kind: str, dtype: torch.dtype) -> str:
    """What a collective carries, by the innermost code of FSDP2 or ours that asked for it."""
    frame = sys._getframe(1)
    while frame is not None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        frame = frame.f_back
        if module.startswith("torch.distributed.fsdp"):
            return "weights (FSDP2)" if kind == "all-gather" else "gradients (FSDP2)"
        if module in ("siglip2.distributed", "siglip2.gather", "siglip2.ring"):
            if not dtype.is_floating_point:
                return _IDS
            return _TEXTS.get(kind, _RING)
        if module == "siglip2.train.parallel":
            return "scalars' gradients"
        if module == "siglip2.train.step" and function != "_backward":
            return "gradient norm, non-finite vote"
        if module in ("siglip2.train.step", "siglip2.train.accumulate"):
            return "gradients (DDP)"
    return "other"
