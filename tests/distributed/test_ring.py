"""The ring: what travels, when, and what stays in memory."""

import pytest
import torch
import torch.distributed as dist

from ranks import run
from siglip2 import distributed, ring
from siglip2.losses import SigLipLoss

D = 16
WORLD = 4
SCALARS = torch.tensor(10.0), torch.tensor(-5.0)


class Recorder:
    """Writes down messages of the ring and the work between them, in order."""

    def __init__(self):
        self.events, self.sent, self.peers = [], [], set()
        neighbours = ring._Neighbours
        start, wait, part = neighbours.start, neighbours.wait, ring._Ring.part

        def recorded_start(n, sent, received):
            self.events.append("start")
            self.sent += [(str(x.dtype), len(x)) for x in sent]
            self.peers.add((n._to, n._from))
            return start(n, sent, received)

        def recorded_wait(n, works):
            self.events.append("wait")
            return wait(n, works)

        def recorded_part(*args):
            self.events.append("compute")
            return part(*args)

        neighbours.start, neighbours.wait, ring._Ring.part = (
            recorded_start,
            recorded_wait,
            recorded_part,
        )

    def take(self) -> tuple[list, list]:
        taken = list(self.events), list(self.sent)
        self.events.clear(), self.sent.clear()
        return taken


def features(num_rows: int, frozen: str = "", dtype: torch.dtype = torch.float32):
    return (
        torch.randn(num_rows, D, dtype=dtype).requires_grad_(name != frozen)
        for name in ("img", "txt")
    )


def messages(recorder, rank):
    """Of rank + 1 rows a rank, in the forward and in the backward, by what takes a gradient."""
    loss, found = SigLipLoss(dist_impl="ring", normalize=True), {}
    for frozen in ("", "img", "txt"):
        img, txt = features(rank + 1, frozen, torch.bfloat16)
        value = loss(img, txt, *SCALARS)
        forward = recorder.take()
        value.backward()
        found[frozen] = (*forward, recorder.take())
    with torch.no_grad():
        loss(*features(rank + 1, dtype=torch.bfloat16), *SCALARS)
    found["no_grad"] = (*recorder.take(), ([], []))
    return found


def memory(recorder, rank):
    found = []
    for num_rows in (32, 64):
        img, txt = features(num_rows)
        storages = {}

        def pack(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = SigLipLoss(dist_impl="ring")(img, txt, *SCALARS)
        found.append((sum(storages.values()), loss.requires_grad))
    return found


def sub_group_peers(recorder, rank):
    """Global ranks that the members of groups (0, 2) and (1, 3) talk to."""
    groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    recorder.peers.clear()
    SigLipLoss(dist_impl="ring", process_group=groups[rank % 2])(*features(3), *SCALARS)
    return list(recorder.peers)


def collectives_in_backward(recorder, rank):
    calls = []
    originals = distributed._all_gather, distributed._reduce_scatter
    loss = SigLipLoss(dist_impl="ring")(*features(3), *SCALARS)
    distributed._all_gather = distributed._reduce_scatter = lambda *_, **__: calls.append(1)
    loss.backward()
    distributed._all_gather, distributed._reduce_scatter = originals
    return len(calls)


def everything(rank, world):
    recorder = Recorder()
    checks = (messages, memory, sub_group_peers, collectives_in_backward)
    return {check.__name__: check(recorder, rank) for check in checks}


@pytest.fixture(scope="module")
def found():
    return run(WORLD, everything)


@pytest.mark.dist
@pytest.mark.parametrize("frozen", ["", "img", "txt", "no_grad"])
def test_texts_make_all_hops_but_one_and_their_float32_gradients_one_more(found, frozen):
    for rank, share in enumerate(found):
        events, sent, (backward_events, _) = share["messages"][frozen]
        texts = [((rank - s) % WORLD) + 1 for s in range(WORLD)]  # rows of the block of each step
        assert [n for dtype, n in sent if dtype == "torch.bfloat16"] == texts[:-1]
        sums = [n for dtype, n in sent if dtype == "torch.float32"]
        assert sums == ([] if frozen in ("txt", "no_grad") else texts)
        assert backward_events == []
        # The next block travels while this one is computed.
        assert events == ["start", "compute", "wait"] * WORLD + ["start", "wait"]


@pytest.mark.dist
def test_saved_bytes_are_one_gradient_of_local_images_and_texts(found):
    for share in found:
        for num_rows, (saved, has_graph) in zip((32, 64), share["memory"], strict=True):
            assert has_graph
            assert 4 * D * 2 * num_rows <= saved <= 4 * D * 2 * num_rows + 64  # a few scalars


@pytest.mark.dist
def test_a_sub_group_talks_to_its_members_global_ranks(found):
    peers = [share["sub_group_peers"] for share in found]
    assert peers == [[(2, 2)], [(3, 3)], [(0, 0)], [(1, 1)]]


@pytest.mark.dist
def test_backward_calls_no_collective(found):
    assert [share["collectives_in_backward"] for share in found] == [0] * WORLD
