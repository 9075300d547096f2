"""Spans of several ranks as a Chrome trace and as a picture."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from siglip2.errors import require

LANES = TOWER, COLLECTIVE, GLOO = "towers", "loss's collectives", "gloo"
WAIT = "wait"  # "<collective>, wait" is the part of it in which the rank stood still


class Span(NamedTuple):
    """Something that lasted; times of all ranks have one origin."""

    rank: int
    lane: str  # of LANES
    name: str
    begin_us: float
    end_us: float


def chrome_trace(spans: Iterable[Span]) -> dict[str, Any]:
    """The "JSON object format": a process for each rank, a thread for each lane."""
    spans = list(spans)
    events: list[dict[str, Any]] = []
    for rank in sorted({span.rank for span in spans}):
        names = [("process_name", 0, f"rank {rank}")]
        names += [("thread_name", i, lane) for i, lane in enumerate(LANES)]
        events += [
            {"ph": "M", "pid": rank, "tid": tid, "name": kind, "args": {"name": name}}
            for kind, tid, name in names
        ]
    for i, span in enumerate(spans):
        place = {"pid": span.rank, "tid": LANES.index(span.lane), "name": span.name}
        begin = {**place, "ts": span.begin_us}
        if span.lane != GLOO:
            events.append({**begin, "ph": "X", "dur": span.end_us - span.begin_us})
            continue
        # Its events overlap without nesting, which only "async" ones may.
        asynchronous = {"cat": GLOO, "id": i}
        events.append({**begin, **asynchronous, "ph": "b"})
        events.append({**place, **asynchronous, "ph": "e", "ts": span.end_us})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def save_timeline(path: Path, spans: Sequence[Span]) -> None:
    """A row for each rank and lane; the dark part of a collective is the wait for it."""
    require("matplotlib", "bench")
    from matplotlib.figure import Figure

    lanes = [TOWER, COLLECTIVE]
    rows = [(rank, lane) for rank in sorted({s.rank for s in spans}) for lane in lanes]
    shown = [span for span in spans if span.lane in lanes]
    names = [n for n in dict.fromkeys(s.name for s in shown) if not n.endswith(WAIT)]
    figure = Figure(figsize=(12, 1 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        for part, color in ((name, f"C{i}"), (f"{name}, {WAIT}", "black")):
            for span in (span for span in shown if span.name == part):
                row = rows.index((span.rank, span.lane))
                bar = [(span.begin_us / 1e3, (span.end_us - span.begin_us) / 1e3)]
                axes.broken_barh(bar, (row - 0.4, 0.8), facecolors=color, edgecolor=color)
        axes.broken_barh([], (0, 0), facecolors=f"C{i}", label=name)
    axes.broken_barh([], (0, 0), facecolors="black", label=WAIT)
    axes.set_yticks(range(len(rows)), [f"rank {rank}, {lane}" for rank, lane in rows])
    axes.invert_yaxis()
    axes.set(xlabel="ms", title="one step; CPU and gloo, so only the order counts")
    figure.legend(ncols=len(names) + 1, fontsize="small", loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
