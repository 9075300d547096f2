"""`SigLipLoss` in place of open_clip's class: the same calls give the same loss and gradients."""

import importlib.util
import inspect
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from compare import assert_no_worse
from ranks import run
from siglip2 import SigLipLoss

pytestmark = pytest.mark.usefixtures("parity_environment")

EXAMPLE = Path(__file__).parents[2] / "examples" / "open_clip_swap.py"
IMPLS = ("bidir", "shift", "reduce", "gather")
# (scale, bias) at the start of training and in the released models
TEMPERATURES = ((10.0, -10.0), (117.0, -16.5))
NAMES = ("loss", "dimg", "dtxt", "dscale", "dbias")
B, D = 5, 24


def their_class():
    """open_clip's class from its loss module alone, which needs nothing but torch."""
    (folder,) = importlib.util.find_spec("open_clip").submodule_search_locations
    spec = importlib.util.spec_from_file_location("their_loss", Path(folder) / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SigLipLoss


def features(rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """This rank's unit rows, rounded to float32 in every dtype; captions are near their images."""
    g = torch.Generator().manual_seed(rank)
    img = F.normalize(torch.randn(B, D, generator=g), dim=-1)
    txt = F.normalize(img + 0.1 * torch.randn(B, D, generator=g), dim=-1)
    return [x.to(dtype).requires_grad_() for x in (img, txt)]


def scalars(temperature: tuple[float, float], dtype: torch.dtype, shape: tuple[int, ...]):
    return [torch.full(shape, x, dtype=dtype, requires_grad=True) for x in temperature]


def loss_and_gradients(loss_class, rank, world, impl, temperature, dtype, shape=()):
    inputs = *features(rank, dtype), *scalars(temperature, dtype, shape)
    names = ("image_features", "text_features", "logit_scale", "logit_bias")
    # The calls of open_clip's create_loss and training loop.
    module = loss_class(rank=rank, world_size=world, dist_impl=impl)
    losses = module(**dict(zip(names, inputs, strict=True)), output_dict=True)
    sum(losses.values()).backward()
    assert list(losses) == ["contrastive_loss"]
    return [losses["contrastive_loss"].detach(), *(x.grad for x in inputs)]


def all_cases(rank, world):
    """Results of both classes over every implementation, temperature and dtype, on this rank."""
    theirs, results = their_class(), {}
    for temperature in TEMPERATURES:
        for dtype in (torch.float32, torch.float64):
            key = temperature, dtype
            for impl in IMPLS:
                results["theirs", impl, *key] = loss_and_gradients(
                    theirs, rank, world, impl, temperature, dtype
                )
            for impl in (None, *IMPLS, "ring"):
                results["ours", impl, *key] = loss_and_gradients(
                    SigLipLoss, rank, world, impl, temperature, dtype
                )
    return results


def assert_all_equal(results):
    """Ours, under every name, errs no more than theirs under each of its own."""
    for (who, impl, temperature, dtype), actual in results.items():
        if who == "theirs":
            continue
        for their_impl in (impl,) if impl in IMPLS else IMPLS:
            eager = results["theirs", their_impl, temperature, dtype]
            gold = results["theirs", their_impl, temperature, torch.float64]
            for name, a, e, g in zip(NAMES, actual, eager, gold, strict=True):
                what = f"{name} of {impl} against {their_impl}, {dtype} at {temperature}"
                assert_no_worse(what, a, e, g, dtype)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_get_open_clips_loss_and_gradients(world):
    for results in run(world, all_cases):
        assert_all_equal(results)


def test_one_process_gets_open_clips_loss_and_gradients():
    assert_all_equal(all_cases(0, 1))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_scalars_of_shape_1_as_in_open_clips_fsdp_models(temperature):
    args = 0, 1, None, temperature
    theirs = their_class()
    eager = loss_and_gradients(theirs, *args, torch.float32, (1,))
    gold = loss_and_gradients(theirs, *args, torch.float64, (1,))
    actual = loss_and_gradients(SigLipLoss, *args, torch.float32, (1,))
    for name, a, e, g in zip(NAMES, actual, eager, gold, strict=True):
        assert_no_worse(name, a, e.reshape(a.shape), g.reshape(a.shape), torch.float32)


def test_value_comes_bare_without_output_dict():
    theirs = their_class()
    for loss_class in (theirs, SigLipLoss):
        img, txt = features(0, torch.float32)
        scale, bias = scalars(TEMPERATURES[0], torch.float32, ())
        value = loss_class()(img, txt, scale, bias)
        named = loss_class()(img, txt, scale, bias, output_dict=True)
        assert torch.equal(value, named["contrastive_loss"])


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_their_arguments_come_first_with_their_defaults(method):
    """Positional calls mean the same, and what they may leave out we may leave out."""
    theirs, ours = (
        list(inspect.signature(getattr(c, method)).parameters.values())
        for c in (their_class(), SigLipLoss)
    )
    assert len(theirs) > 1
    for a, b in zip(theirs, ours, strict=False):
        assert a.name == b.name
        assert b.kind == b.POSITIONAL_OR_KEYWORD
        if a.default is not a.empty:
            assert a.default == b.default
    assert all(p.kind == p.KEYWORD_ONLY or p.default is not p.empty for p in ours[len(theirs) :])


def test_chunk_size_of_later_releases_changes_nothing():
    results = []
    for arguments in ({}, {"chunk_size": 2}, {"cache_labels": True, "chunk_size": 1024}):
        img, txt = features(0, torch.float32)
        SigLipLoss(**arguments)(img, txt, *scalars(TEMPERATURES[1], img.dtype, ())).backward()
        results.append(torch.cat([img.grad, txt.grad]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_open_clips_own_factory_builds_ours(monkeypatch):
    import open_clip.factory

    monkeypatch.setattr(open_clip.factory, "SigLipLoss", SigLipLoss)
    fields = {"distill": False, "model": "ViT-B-16-SigLIP2", "siglip": True, "horovod": False}
    arguments = SimpleNamespace(**fields, rank=0, world_size=1, loss_dist_impl=None)
    assert type(open_clip.factory.create_loss(arguments)) is SigLipLoss


def test_example_trains_open_clips_model(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = re.findall(r"open_clip (\S+) loss (\S+)", capsys.readouterr().out)
    assert all(theirs == ours for theirs, ours in lines)
    assert float(lines[-1][1]) < float(lines[0][1]) / 2
