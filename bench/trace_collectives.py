"""When the loss's collectives are under way, beside what the towers do: a trace of one step.

    python -P -m siglip2_bench.trace_collectives --out collectives.json [--png collectives.png]

Runs `TrainStep` under DDP on several gloo processes of this machine and writes a Chrome trace
(chrome://tracing, ui.perfetto.dev) of all ranks with three rows each: the towers' forwards and
backwards, the loss's collectives from their start to the end of their wait, and what the profiler
saw of gloo itself.  On a CPU the order of events is the result; their lengths say nothing of a GPU.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

from siglip2 import distributed
from siglip2.config import OptimConfig
from siglip2.models.factory import create_model
from siglip2.train.optim import adamw
from siglip2.train.parallel import wrap
from siglip2.train.step import TrainStep
from siglip2.train.task import Siglip2Task

from .timeline import COLLECTIVE, GLOO, TOWER, WAIT, Span, chrome_trace, save_timeline

GATHER, SCATTER = "all-gather", "reduce-scatter"
TOWERS = {"vision": "image tower", "text": "text tower"}
HIDDEN_BY = {GATHER: "image tower forward", SCATTER: "image tower backward"}
WARM_STEPS = 2  # DDP lays out its buckets after the first
_MARK = "siglip2_trace"


def trace_step(num_ranks: int, model: str, batch_size: int) -> list[Span]:
    """Spans of one step on `num_ranks` processes, `batch_size` pairs each, by rank and begin."""
    with tempfile.TemporaryDirectory() as folder:
        # Silent, or the profiler says on stderr that it started and stopped.
        with mock.patch.dict(os.environ, KINETO_LOG_LEVEL="99"):
            mp.spawn(_worker, (num_ranks, folder, model, batch_size), nprocs=num_ranks, join=True)
        raw = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(num_ranks)]
    spans = [span for rank, events in enumerate(raw) for span in _spans(rank, events)]
    first_us = min(span.begin_us for span in spans)
    moved = [s._replace(begin_us=s.begin_us - first_us, end_us=s.end_us - first_us) for s in spans]
    return sorted(moved, key=lambda span: (span.rank, span.begin_us))


def exposed(spans: Sequence[Span]) -> list[str]:
    """What each rank does not hide: a collective that starts after, or is awaited before the end
    of, the computation meant to hide it."""
    found = []
    for rank in sorted({span.rank for span in spans}):
        by_name = {s.name: s for s in spans if s.rank == rank and s.lane != GLOO}
        for collective, work in HIDDEN_BY.items():
            if not {collective, f"{collective}, {WAIT}", work} <= by_name.keys():
                found.append(f"rank {rank}: no asynchronous {collective} beside the {work}")
                continue
            if by_name[collective].begin_us > by_name[work].begin_us:
                found.append(f"rank {rank}: the {collective} starts after the {work} does")
            if by_name[f"{collective}, {WAIT}"].begin_us < by_name[work].end_us:
                found.append(f"rank {rank}: the {collective} is awaited before the {work} ends")
    return found


def summary(spans: Sequence[Span]) -> list[str]:
    """A line for each rank: how long each collective was under way, and how much of it waited."""
    lines = []
    for rank in sorted({span.rank for span in spans}):
        parts = []
        for name in (GATHER, SCATTER):
            flight, wait = (
                sum(s.end_us - s.begin_us for s in spans if s.rank == rank and s.name == n) / 1e3
                for n in (name, f"{name}, {WAIT}")
            )
            parts.append(f"{name} under way {flight:.2f} ms, waited for {wait:.2f} ms")
        lines.append(f"rank {rank}: {'; '.join(parts)}")
    return lines


def _worker(rank: int, world: int, folder: str, model: str, batch_size: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    torch.manual_seed(rank)
    task = Siglip2Task(create_model(model))
    step = TrainStep(wrap(task, "ddp"), adamw(task, OptimConfig()))
    batch = _batch(task, batch_size)
    for _ in range(WARM_STEPS):
        step(batch)
    with _marked(task):
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step(batch)
    path = Path(folder) / f"{rank}.profile.json"
    profiler.export_chrome_trace(str(path))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(_events(path)))
    with suppress(RuntimeError):  # another rank may have left first
        dist.barrier()
    os._exit(0)  # gloo's teardown now and then aborts


def _batch(task: Siglip2Task, size: int) -> dict[str, Tensor]:
    arch = task.model.architecture
    side = arch.vision.image_size
    return {
        "image": 2 * torch.rand(size, 3, side, side) - 1,
        "text": torch.randint(2, arch.text.vocab_size, (size, arch.text.length)),
    }


def _mark(what: str, point: str) -> None:
    """An instant among the profiler's events, at its clock."""
    with record_function(f"{_MARK}|{what}|{point}"):
        pass


@contextmanager
def _marked(task: Siglip2Task) -> Iterator[None]:
    """Marks where towers and the loss's collectives begin and end."""
    handles = [h for name, what in TOWERS.items() for h in _hooks(getattr(task.model, name), what)]
    names = {"_all_gather": GATHER, "_reduce_scatter": SCATTER}
    patches = [
        mock.patch.object(distributed, name, _traced(getattr(distributed, name), what))
        for name, what in names.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
        for handle in handles:
            handle.remove()


def _hooks(tower: nn.Module, what: str) -> list[torch.utils.hooks.RemovableHandle]:
    """The backward lasts from the output's gradient to the last parameter's."""

    def after_forward(module: nn.Module, args: tuple, output: Any) -> None:
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(lambda dx: _mark(f"{what} backward", "begin"))
        _mark(f"{what} forward", "end")

    handles = [
        tower.register_forward_pre_hook(lambda module, args: _mark(f"{what} forward", "begin")),
        tower.register_forward_hook(after_forward),
    ]
    for p in tower.parameters():
        hook = p.register_post_accumulate_grad_hook(lambda p: _mark(f"{what} backward", "end"))
        handles.append(hook)
    return handles


class _TracedWork:
    def __init__(self, work: dist.Work, what: str):
        self._work, self._what = work, what

    def wait(self) -> bool:
        _mark(f"{self._what}, {WAIT}", "begin")
        done = self._work.wait()
        _mark(f"{self._what}, {WAIT}", "end")
        _mark(self._what, "end")
        return done


def _traced(collective: Callable, what: str) -> Callable:
    """Asynchronous calls are marked; host numbers cross ranks in synchronous ones."""

    def call(*args, async_op: bool = False, **kwargs) -> Any:
        if not async_op:
            return collective(*args, **kwargs)
        _mark(what, "begin")
        return _TracedWork(collective(*args, async_op=True, **kwargs), what)

    return call


def _events(path: Path) -> list[tuple[str, float, float]]:
    """Marks and gloo's own events of a profile: name, begin and length in us since the epoch."""
    raw = json.loads(path.read_text())
    base_us = raw.get("baseTimeNanoseconds", 0) / 1e3
    return [
        (event["name"], base_us + event["ts"], event.get("dur", 0.0))
        for event in raw["traceEvents"]
        if event.get("ph") == "X" and event["name"].startswith((f"{_MARK}|", "gloo:"))
    ]


def _spans(rank: int, events: Iterable[Sequence[Any]]) -> Iterator[Span]:
    """Marks joined from the first begin to the last end, and gloo's events as they are."""
    points: dict[str, dict[str, list[float]]] = {}
    for name, begin_us, length_us in events:
        if name.startswith("gloo:"):
            yield Span(rank, GLOO, name, begin_us, begin_us + length_us)
            continue
        _, what, point = name.split("|")
        points.setdefault(what, {}).setdefault(point, []).append(begin_us)
    for what, found in points.items():
        lane = TOWER if "tower" in what else COLLECTIVE
        yield Span(rank, lane, what, min(found["begin"]), max(found["end"]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -P -m siglip2_bench.trace_collectives",
        description=__doc__.partition("\n")[0],
    )
    parser.add_argument("--out", type=Path, default=Path("collectives.json"), help="Chrome trace")
    parser.add_argument("--png", type=Path, help="also draw it")
    parser.add_argument("--ranks", type=int, default=4, help="processes (default: %(default)s)")
    parser.add_argument("--model", default="siglip2-quickstart-patch8-32", help="%(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs a rank (%(default)s)")
    args = parser.parse_args(argv)
    spans = trace_step(args.ranks, args.model, args.batch_size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(chrome_trace(spans)) + "\n")
    verdict = exposed(spans) or ["each collective is under way during all the work that hides it"]
    print("\n".join([*summary(spans), *verdict, f"wrote {args.out}"]))
    if args.png:
        save_timeline(args.png, spans)
        print(f"wrote {args.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
