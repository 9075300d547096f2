"""A rank that holds something else, dies or never comes: an error that says so, not a hang."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from ranks import run
from siglip2 import distributed
from siglip2.distributed import (
    RankLostError,
    check_descriptions,
    gather_counts,
    wait_for_all,
    waiting_for,
)
from siglip2.losses import SigLipLoss

SCALARS = torch.tensor(10.0), torch.tensor(-5.0)
LATE = 1
DEAD = 1


def features(num_rows=4, dim=8, dtype=torch.float32, has_grad=True):
    return torch.randn(num_rows, dim, dtype=dtype).requires_grad_(has_grad)


def message_of(fn, *args, **options) -> str:
    try:
        fn(*args, **options)
    except (ValueError, RankLostError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def mismatches(rank, world):
    """What each rank hears when rank 1 alone holds something else."""
    odd = rank == 1
    ids = {"image_ids": torch.arange(4), "text_ids": torch.arange(4)} if odd else {}
    ignore = {"image_ignore_ids": torch.arange(4), "text_ignore_ids": torch.arange(4)}
    calls = {
        "width": lambda loss: loss(features(), features(dim=16 if odd else 8), *SCALARS),
        "dtype": lambda loss: loss(
            features(), features(dtype=torch.bfloat16 if odd else torch.float32), *SCALARS
        ),
        "ids": lambda loss: loss(features(), features(), *SCALARS, **ids),
        "ignore ids": lambda loss: loss(
            features(), features(), *SCALARS, **(ignore if odd else {})
        ),
        "frozen text": lambda loss: loss(features(), features(has_grad=not odd), *SCALARS),
        "frozen image": lambda loss: loss(features(has_grad=not odd), features(), *SCALARS),
    }
    found = {
        (name, impl): message_of(call, SigLipLoss(dist_impl=impl, check_shapes=True))
        for name, call in calls.items()
        for impl in ("gather", "ring")
    }
    for impl in ("gather", "ring"):
        found["too few texts", impl] = message_of(
            SigLipLoss(dist_impl=impl), features(), features(4 - odd), *SCALARS
        )
    return found


def uneven_rows_pass_and_are_compared_once(rank, world):
    calls, original = [], distributed._all_gather

    def counted(out, sent, **options):
        calls.append(sent.dtype == torch.uint8)
        return original(out, sent, **options)

    distributed._all_gather = counted
    loss = SigLipLoss(check_shapes=True)
    for _ in range(2):
        loss(features(rank), features(rank), *SCALARS)
    distributed._all_gather = original
    return sum(calls)


def late_rank(rank, world):
    """Rank 1 stays away from two of three meetings."""
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3 % world])] if world == 4 else []
    found = {"all came": message_of(wait_for_all, "start", 30)}
    start = time.monotonic()
    if rank != LATE:
        found["late"] = message_of(wait_for_all, "start", 0.5)
        loss = SigLipLoss(check_shapes=True)
        loss.arrival_timeout_s = 0.5
        found["loss"] = message_of(loss, features(), features(), *SCALARS)
    found["seconds"] = time.monotonic() - start
    if pairs:
        group = pairs[rank % 2]
        away = rank == LATE
        found["sub-group"] = "none" if away else message_of(wait_for_all, "sub-group", 0.5, group)
    return found


def checks(rank, world):
    return {
        "mismatches": mismatches(rank, world),
        "compared": uneven_rows_pass_and_are_compared_once(rank, world),
        "late": late_rank(rank, world),
    }


def dead_rank(rank, world):
    """Rank 1 leaves after the forward of one loss and the counts of a ring."""
    cpu = torch.device("cpu")
    groups = {name: dist.new_group() for name in ("ring", "gather", "backward", "comparison")}
    loss = SigLipLoss(process_group=groups["backward"])(features(), features(), *SCALARS)
    for group in groups.values():  # a group connects with its first collective
        dist.barrier(group)
    if rank == DEAD:
        gather_counts((4, 4), cpu, groups["ring"])
        os._exit(0)
    start, found = time.monotonic(), {}
    for impl in ("ring", "gather"):
        module = SigLipLoss(dist_impl=impl, process_group=groups[impl])
        found[impl] = message_of(module, features(), features(), *SCALARS)
    found["backward"] = message_of(loss.backward)
    found["comparison"] = message_of(check_descriptions, "x", "y", cpu, groups["comparison"])
    found["seconds"] = time.monotonic() - start
    return found


@pytest.fixture(scope="module")
def found():
    return run(4, checks)


@pytest.mark.dist
@pytest.mark.parametrize("impl", ["gather", "ring"])
@pytest.mark.parametrize(
    ("name", "odd", "others"),
    [
        ("width", "(n, 16) torch.float32", "(n, 8) torch.float32"),
        ("dtype", "(n, 8) torch.bfloat16", "(n, 8) torch.float32"),
        ("ids", "ids torch.int64, no ignore ids", "no ids, no ignore ids"),
        ("ignore ids", "no ids, ignore ids torch.int64", "no ids, no ignore ids"),
        ("frozen text", "no gradient", "a gradient"),
        ("frozen image", "no gradient", "a gradient"),
    ],
)
def test_every_rank_hears_which_rank_holds_what(found, name, odd, others, impl):
    what = "images" if name == "frozen image" else "texts"
    for share in found:
        start, held = share["mismatches"][name, impl].split("; got ")
        assert start.startswith(f"ValueError: ranks disagree on the sigmoid loss's {what}: need")
        of_others, of_odd = held.split("; ")
        assert of_others.startswith("ranks 0, 2, 3: ")
        assert others in of_others
        assert of_odd.startswith("rank 1: ")
        assert odd in of_odd


@pytest.mark.dist
@pytest.mark.parametrize("impl", ["gather", "ring"])
def test_every_rank_hears_of_one_rank_with_too_few_texts(found, impl):
    for share in found:
        message = share["mismatches"]["too few texts", impl]
        assert "got [4, 4, 4, 4] images and [4, 3, 4, 4] texts" in message


@pytest.mark.dist
def test_uneven_rows_are_no_mismatch_and_only_the_first_call_compares(found):
    assert [share["compared"] for share in found] == [2] * 4  # texts, images


@pytest.mark.dist
def test_a_rank_that_never_arrives_is_named_within_seconds(found):
    for rank, share in enumerate(found):
        late = share["late"]
        assert late["all came"] == "none"
        assert late["seconds"] < 5
        if rank != LATE:
            expected = f"RankLostError: rank {rank} waited 0.5 s for rank 1 at "
            assert late["late"].startswith(f"{expected}start. Look for")
            assert late["loss"].startswith(f"{expected}the first sigmoid loss. Look for")


@pytest.mark.dist
def test_a_sub_group_misses_its_own_ranks_only(found):
    heard = [share["late"]["sub-group"] for share in found]
    assert [heard[r] for r in (0, 1, 2)] == ["none"] * 3
    assert "rank 3 waited 0.5 s for rank 1 at sub-group" in heard[3]


@pytest.mark.dist
def test_a_dead_rank_ends_the_wait_of_the_others():
    shares = run(3, dead_rank)
    assert shares[DEAD] is None
    for rank in (0, 2):
        share = shares[rank]
        assert share.pop("seconds") < 20
        for place, what in {
            "ring": f"texts from rank {(rank - 1) % 3} and room at rank {(rank + 1) % 3} in a ring",
            "gather": "the numbers of rows",
            "backward": "the gradients of its texts",
            "comparison": "a comparison of x",
        }.items():
            expected = f"RankLostError: rank {rank} lost another rank while it waited for {what}"
            assert share[place].startswith(expected)
            assert "then start all ranks again from the last checkpoint" in share[place]


def test_other_errors_pass_a_wait_unchanged():
    with pytest.raises(RuntimeError, match="shapes differ") as caught, waiting_for("x"):
        raise RuntimeError("shapes differ")
    assert type(caught.value) is RuntimeError
