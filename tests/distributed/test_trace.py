"""The loss's collectives are in flight while the image tower computes, as the events show."""

import json

import pytest

from siglip2_bench import trace_collectives
from siglip2_bench.timeline import GLOO, Span, chrome_trace, save_timeline
from siglip2_bench.trace_collectives import exposed

NUM_RANKS = 4


@pytest.fixture(scope="module")
def spans():
    return trace_collectives.trace_step(NUM_RANKS, "siglip2-tiny-patch8-32", batch_size=8)


def of_rank(spans, rank):
    return {s.name: s for s in spans if s.rank == rank and s.lane != GLOO}


@pytest.mark.dist
@pytest.mark.slow
def test_collectives_are_in_flight_during_the_image_tower(spans):
    assert {span.rank for span in spans} == set(range(NUM_RANKS))
    for rank in range(NUM_RANKS):
        at = of_rank(spans, rank)
        order = [
            at["text tower forward"].end_us,
            at["all-gather"].begin_us,
            at["image tower forward"].begin_us,
            at["image tower forward"].end_us,
            at["all-gather, wait"].begin_us,
            at["all-gather"].end_us,
            at["reduce-scatter"].begin_us,
            at["image tower backward"].begin_us,
            at["image tower backward"].end_us,
            at["reduce-scatter, wait"].begin_us,
            at["reduce-scatter"].end_us,
            at["text tower backward"].begin_us,
            at["text tower backward"].end_us,
        ]
        assert order == sorted(order), f"rank {rank}: {at}"
    assert not exposed(spans)


@pytest.mark.dist
@pytest.mark.slow
def test_gloo_works_on_them_between_start_and_wait(spans):
    for rank in range(NUM_RANKS):
        at = of_rank(spans, rank)
        begins = [s.begin_us for s in spans if s.rank == rank and s.lane == GLOO]
        for collective in ("all-gather", "reduce-scatter"):
            first, last = at[collective].begin_us, at[collective].end_us
            assert any(first <= begin <= last for begin in begins), (rank, collective)


@pytest.mark.dist
@pytest.mark.slow
def test_the_chrome_trace_has_every_rank_and_span(spans, tmp_path):
    pytest.importorskip("matplotlib")
    events = json.loads(json.dumps(chrome_trace(spans)))["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {f"rank {rank}" for rank in range(NUM_RANKS)}
    complete = {(e["pid"], e["name"]): e["ts"] + e["dur"] for e in events if e["ph"] == "X"}
    assert complete == pytest.approx(
        {(s.rank, s.name): s.end_us for s in spans if s.lane != GLOO}, abs=1e-3
    )
    begun, ended = ({e["id"] for e in events if e["ph"] == phase} for phase in "be")
    assert len(begun) == sum(s.lane == GLOO for s in spans)
    assert begun == ended
    save_timeline(tmp_path / "timeline.png", spans)
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def by_hand(**changes):
    times = {
        "all-gather": (0, 30),
        "all-gather, wait": (29, 30),
        "image tower forward": (1, 28),
        "reduce-scatter": (40, 70),
        "reduce-scatter, wait": (68, 70),
        "image tower backward": (41, 67),
    }
    times |= {name.replace("_", " "): value for name, value in changes.items()}
    lane = lambda name: "towers" if "tower" in name else "loss's collectives"
    return [Span(0, lane(n), n, *t) for n, t in times.items() if t]


def test_exposed_collectives_are_named():
    assert exposed(by_hand()) == []
    late = by_hand(**{"all-gather": (2, 30)})
    assert exposed(late) == ["rank 0: the all-gather starts after the image tower forward does"]
    early = by_hand(**{"reduce-scatter, wait": (50, 51)})
    assert exposed(early) == [
        "rank 0: the reduce-scatter is awaited before the image tower backward ends"
    ]
    synchronous = by_hand(**{"all-gather": None})
    assert exposed(synchronous) == [
        "rank 0: no asynchronous all-gather beside the image tower forward"
    ]
