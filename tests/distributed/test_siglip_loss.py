"""Any number of ranks, with any number of rows each, give one rank's loss and gradients."""

import logging
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from compare import assert_no_worse
from ranks import run
from siglip2.losses import SigLipLoss
from siglip2_kernels.sigmoid_loss import reference

D = 24
NAMES = ("loss", "dimg", "dtxt", "dscale", "dbias")
# dist_impl, and whether start_gather is called apart from forward
IMPLS = [("gather", False), ("gather", True), ("ring", False), ("ring", True)]
IMPL_IDS = ["gather", "gather-early", "ring", "ring-early"]
PAIRS_OF_RANKS = [[0, 2], [1, 3]]


class Case(NamedTuple):
    images: tuple[int, ...]  # of each rank
    texts: tuple[int, ...] | None = None  # None: as many as images
    has_ids: bool = False
    has_ignore_ids: bool = False
    dtype: torch.dtype = torch.float32
    normalize: bool = False
    frozen: str = ""  # "img" or "txt"
    scale: float = 10.0


CASES = {
    "equal": Case((4, 4)),
    "equal-float64": Case((4, 4), dtype=torch.float64),
    "uneven": Case((5, 2)),
    "uneven-float64": Case((5, 2), dtype=torch.float64),
    "empty-rank": Case((0, 3)),
    "one-image-two-ranks": Case((1, 0)),
    "no-rows": Case((0, 0)),
    "more-texts-on-one-rank": Case((4, 3), (2, 7), has_ids=True),
    "images-here-texts-there": Case((4, 0), (0, 5), has_ids=True),
    "trained-scale": Case((6, 6), scale=117.0),
    "frozen-img": Case((3, 2), frozen="img"),
    "frozen-txt": Case((3, 2), frozen="txt"),
    "normalize": Case((4, 3), normalize=True),
    "normalize-bfloat16": Case((4, 3), normalize=True, dtype=torch.bfloat16),
    "bfloat16": Case((4, 4), dtype=torch.bfloat16),
    "four-ranks": Case((3, 1, 4, 2)),
    "four-ranks-equal-float64": Case((3, 3, 3, 3), dtype=torch.float64),
    "four-ranks-two-empty": Case((0, 3, 0, 2)),
    "four-ranks-ids": Case((4, 3, 1, 2), (8, 6, 2, 4), has_ids=True),
    "four-ranks-ignore-ids": Case((3, 1, 4, 2), has_ignore_ids=True),
    "four-ranks-both-ids-float64": Case(
        (3, 1, 0, 2), (2, 2, 3, 0), has_ids=True, has_ignore_ids=True, dtype=torch.float64
    ),
    "four-ranks-bfloat16": Case((3, 1, 4, 2), dtype=torch.bfloat16, normalize=True),
}


def make_inputs(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of all ranks. Ids repeat every three rows, so that they cross ranks."""
    g = torch.Generator().manual_seed(seed)
    num_images, num_texts = sum(case.images), sum(case.texts or case.images)
    img = torch.randn(num_images, D, generator=g, dtype=torch.float64)
    txt = torch.randn(num_texts, D, generator=g, dtype=torch.float64)
    img, txt = (x if case.normalize else F.normalize(x, dim=-1) for x in (img, txt))
    inputs = {"img": img.to(case.dtype), "txt": txt.to(case.dtype)}
    if case.has_ids:
        inputs |= {"img_ids": torch.arange(num_images) % 3, "txt_ids": torch.arange(num_texts) % 3}
    if case.has_ignore_ids:
        ignore = torch.arange(num_images) % 2, torch.arange(num_texts) % 2
        inputs |= dict(zip(("img_ignore_ids", "txt_ignore_ids"), ignore, strict=True))
    return inputs


def scalars_of(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (case.scale, -5.0)]


def call(loss: SigLipLoss, inputs: dict, scalars: list, is_early: bool) -> torch.Tensor:
    names = {"img_ids": "image_ids", "txt_ids": "text_ids"}
    names |= {"img_ignore_ids": "image_ignore_ids", "txt_ignore_ids": "text_ignore_ids"}
    ids = {names[key]: x for key, x in inputs.items() if key in names}
    txt = inputs["txt"]
    if is_early:
        of_texts = {key: ids.pop(key) for key in list(ids) if key.startswith("text")}
        txt = loss.start_gather(txt, num_images=len(inputs["img"]), **of_texts)
    return loss(inputs["img"], txt, *scalars, **ids)


def share_of(case: Case, rank: int, seed: int) -> dict[str, torch.Tensor]:
    share = {}
    for key, x in make_inputs(case, seed).items():
        sizes = case.images if key.startswith("img") else case.texts or case.images
        first = sum(sizes[:rank])
        share[key] = x[first : first + sizes[rank]]
    for key in {"img", "txt"} - {case.frozen}:
        share[key].requires_grad_()
    return share


def rank_results(case: Case, rank: int, impl: tuple, seed: int = 0, group=None) -> dict:
    """This rank's loss and gradients; whether a second backward and a no_grad forward agree."""
    inputs = share_of(case, rank, seed)
    scalars = scalars_of(case, torch.promote_types(case.dtype, torch.float32))
    module = SigLipLoss(dist_impl=impl[0], process_group=group, normalize=case.normalize)
    loss = call(module, inputs, scalars, impl[1])
    leaves = [x for x in (inputs["img"], inputs["txt"], *scalars) if x.requires_grad]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    loss.backward()
    with torch.no_grad():
        same_loss = call(module, inputs, scalars, impl[1])
    return {
        "results": [loss.detach(), *(x.grad for x in (inputs["img"], inputs["txt"], *scalars))],
        "twice": all(map(torch.equal, first, [x.grad for x in leaves])),
        "no_grad": torch.equal(loss.detach(), same_loss) and not same_loss.requires_grad,
    }


def all_cases(rank, world):
    found = {}
    for name, case in CASES.items():
        for impl, impl_id in zip(IMPLS, IMPL_IDS, strict=True):
            if len(case.images) == world:
                found[name, impl_id] = rank_results(case, rank, impl)
    if world == 4:
        groups = [dist.new_group(ranks) for ranks in PAIRS_OF_RANKS]
        mine = next(i for i, ranks in enumerate(PAIRS_OF_RANKS) if rank in ranks)
        for impl, impl_id in zip(IMPLS, IMPL_IDS, strict=True):
            inside = PAIRS_OF_RANKS[mine].index(rank)
            found["sub-groups", impl_id] = rank_results(
                CASES["uneven"], inside, impl, seed=mine, group=groups[mine]
            )
    return found


@cache
def on_ranks(world: int) -> list[dict]:
    return run(world, all_cases)


def scalar_terms(case: Case, seed: int) -> list[torch.Tensor]:
    """Sums of the absolute terms of the scalars' gradients, which cancel."""
    inputs = make_inputs(case, seed)
    img, txt = (inputs.pop(key).double() for key in ("img", "txt"))
    scale, bias = (
        x.detach().expand(len(img), len(txt)).clone().requires_grad_()
        for x in scalars_of(case, torch.float64)
    )
    losses = reference.weighted_pair_losses(
        img, txt, scale.log(), bias, normalize=case.normalize, **inputs
    )
    of_pairs = torch.autograd.grad(losses.sum(), (scale, bias))
    return [x.abs().sum() / max(len(img), 1) for x in of_pairs]


def assert_one_rank_gives(case: Case, shares: list[dict], seed: int = 0) -> None:
    results, world = [share["results"] for share in shares], len(shares)
    loss = torch.stack([r[0] for r in results]).mean()
    # DDP divides summed gradients by the number of ranks.
    features = [[r[i] for r in results if r[i] is not None] for i in (1, 2)]
    dimg, dtxt = (torch.cat(x) / world if x else None for x in features)
    dscale, dbias = (torch.stack([r[i] for r in results]).mean() for i in (3, 4))

    def single(dtype):
        inputs = make_inputs(case, seed)
        img, txt = (inputs.pop(key).to(dtype).requires_grad_() for key in ("img", "txt"))
        scale, bias = scalars_of(case, torch.promote_types(dtype, torch.float32))
        normalize = {"normalize": case.normalize}
        value = reference.sigmoid_loss(img, txt, scale.log(), bias, **inputs, **normalize)
        value.backward()
        return [x.detach() for x in (value, img.grad, txt.grad, scale.grad, bias.grad)]

    eager, gold = single(case.dtype), single(torch.float64)
    terms = dict(zip(("dscale", "dbias"), scalar_terms(case, seed), strict=True))
    for name, a, e, g in zip(NAMES, (loss, dimg, dtxt, dscale, dbias), eager, gold, strict=True):
        if name == f"d{case.frozen}":
            assert a is None
        else:
            assert_no_worse(name, a, e, g, case.dtype, terms=terms.get(name, 0.0))


@pytest.mark.dist
@pytest.mark.parametrize("impl", IMPL_IDS)
@pytest.mark.parametrize("name", CASES)
def test_mean_over_ranks_is_the_one_rank_loss(name, impl):
    case = CASES[name]
    assert_one_rank_gives(case, [share[name, impl] for share in on_ranks(len(case.images))])


@pytest.mark.dist
@pytest.mark.parametrize("impl", IMPL_IDS)
def test_each_process_group_has_its_own_negatives(impl):
    found = [share["sub-groups", impl] for share in on_ranks(4)]
    for seed, ranks in enumerate(PAIRS_OF_RANKS):
        assert_one_rank_gives(CASES["uneven"], [found[r] for r in ranks], seed)


@pytest.mark.dist
@pytest.mark.parametrize("claim", ["twice", "no_grad"])
def test_second_backward_and_no_grad_give_the_same_bits(claim):
    for world in (2, 4):
        for share in on_ranks(world):
            assert all(result[claim] for result in share.values())


@pytest.mark.parametrize("normalize", [False, True])
def test_pending_texts_on_one_rank_give_the_plain_call(normalize):
    case = Case((5,), (7,), has_ids=True, has_ignore_ids=True, normalize=normalize)
    inputs, scalars = make_inputs(case), scalars_of(case, torch.float32)
    module = SigLipLoss(normalize=normalize)
    plain, early = (call(module, inputs, scalars, is_early) for is_early in (False, True))
    assert torch.equal(plain, early)
    assert_no_worse(
        "loss",
        early.detach(),
        *(
            reference.sigmoid_loss(
                **{k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()},
                log_scale=scalars[0].detach().to(dtype).log(),
                bias=scalars[1].detach().to(dtype),
                normalize=normalize,
            )
            for dtype in (torch.float32, torch.float64)
        ),
        torch.float32,
    )


def test_open_clip_names_are_mapped_with_a_note(caplog):
    with caplog.at_level(logging.INFO, logger="siglip2"):
        SigLipLoss(dist_impl="bidir")
    assert "using 'gather'" in caplog.text


def test_rejects_an_unknown_dist_impl():
    with pytest.raises(NotImplementedError, match=r"need dist_impl 'gather' or 'ring'.*got 'tree'"):
        SigLipLoss(dist_impl="tree")


def test_rejects_a_world_size_without_a_process_group():
    with pytest.raises(ValueError, match="world_size=8 but the process group has 1 ranks"):
        SigLipLoss(world_size=8)


@pytest.mark.parametrize("kind", ["ids", "ignore_ids"])
def test_rejects_ids_for_one_side_only(kind):
    inputs = make_inputs(Case((4,)))
    ids = {f"image_{kind}": torch.arange(4)}
    with pytest.raises(ValueError, match=f"need both image_{kind} and text_{kind}"):
        SigLipLoss()(inputs["img"], inputs["txt"], torch.tensor(10.0), torch.tensor(-5.0), **ids)


def test_rejects_what_contradicts_start_gather():
    inputs, loss = make_inputs(Case((4,))), SigLipLoss()
    scalars = torch.tensor(10.0), torch.tensor(-5.0)
    pending = loss.start_gather(inputs["txt"], num_images=4)
    with pytest.raises(ValueError, match="need the 4 images start_gather was told of; got 3"):
        loss(inputs["img"][:3], pending, *scalars)
    with pytest.raises(ValueError, match="text ids go into start_gather"):
        loss(inputs["img"], pending, *scalars, text_ids=torch.arange(4))
    loss(inputs["img"], pending, *scalars)
    with pytest.raises(ValueError, match="call start_gather again"):
        loss(inputs["img"], pending, *scalars)
