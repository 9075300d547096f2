"""The vision tower against timm's `VisionTransformer` and `NaFlexVit`, weights both ways."""

import pytest
import torch
from models.tiny import (
    double,
    random_images,
    random_model,
    timm_batch,
    tiny_architecture,
)

from siglip2.models.factory import load_vision, save_pretrained
from siglip2.models.presets import ARCHITECTURES
from siglip2.models.siglip2 import Siglip2
from siglip2.models.weights import timm as timm_format
from siglip2.models.weights.rules import export_state

pytestmark = pytest.mark.usefixtures("parity_environment")

GRIDS = [(4, 4), (2, 7), (6, 3)]
KINDS = pytest.mark.parametrize("is_naflex", [False, True], ids=["fixed", "naflex"])


def theirs(model, folder):
    """timm's tower, built and filled by timm from what `save_pretrained` wrote."""
    import timm

    save_pretrained(model, folder, format="timm")
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def batch_for(architecture):
    vision = architecture.vision
    if vision.is_naflex:
        return timm_batch(random_images(GRIDS, vision.patch_size), GRIDS)
    return torch.rand(3, 3, vision.image_size, vision.image_size, dtype=torch.float64) * 2 - 1


@KINDS
@pytest.mark.parametrize(
    ("head_width", "num_heads"),
    [
        pytest.param(64, 2, id="head-64"),
        pytest.param(72, 1, id="head-72"),
        pytest.param(96, 1, id="head-96"),
    ],
)
def test_embeddings_and_gradients_equal_timm(is_naflex, head_width, num_heads, tmp_path):
    architecture = tiny_architecture(
        head_width=head_width, num_heads=num_heads, is_naflex=is_naflex
    )
    model = random_model(architecture)
    if is_naflex:  # timm resamples positions in float32
        torch.nn.init.zeros_(model.vision.posemb)
    reference = theirs(model, tmp_path).double()
    batch = batch_for(architecture)
    expected, actual = reference(batch), double(model).encode_image(batch)
    loss_of = lambda x: (x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum()
    loss_of(expected).backward()
    loss_of(actual).backward()
    gradients = {f"vision.{name}": p.grad for name, p in model.vision.named_parameters()}
    ours = export_state(timm_format.vision_rules(architecture.vision), gradients)
    pairs = {name: (ours[name], p.grad) for name, p in reference.named_parameters()}
    pairs["embeddings"] = actual.detach(), expected.detach()
    for name, (a, b) in pairs.items():
        if is_naflex and name == "embeds.pos_embed":
            continue
        # 2^12 roundings: any other formula is further off than that
        allowed = 2**12 * torch.finfo(torch.float64).eps * b.abs().max()
        assert (a - b).abs().max() <= allowed, name


def test_positions_resample_as_in_timm(tmp_path):
    architecture = tiny_architecture(is_naflex=True)
    model = random_model(architecture)
    reference = theirs(model, tmp_path).double()
    batch = batch_for(architecture)
    with torch.no_grad():
        expected, actual = reference(batch), double(model).encode_image(batch)
        reference.embeds.pos_embed.zero_()
        without = reference(batch)
    # timm resamples in float32: its rounding, against the whole effect of the positions
    error, effect = (actual - expected).abs().max(), (without - expected).abs().max()
    assert error <= 64 * torch.finfo(torch.float32).eps * effect


@KINDS
def test_timm_files_fill_the_vision_tower_bit_for_bit(is_naflex, tmp_path):
    import timm

    architecture = tiny_architecture(is_naflex=is_naflex)
    source, target = random_model(architecture), random_model(architecture, seed=1)
    reference = theirs(source, tmp_path / "ours")
    timm.models.save_for_hf(
        reference, tmp_path / "theirs", model_config={"num_classes": 0}, safe_serialization=True
    )
    load_vision(target, tmp_path / "theirs")
    for name, x in source.vision.state_dict().items():
        assert torch.equal(target.vision.state_dict()[name], x), name


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if "tiny" not in n and "quick" not in n])
def test_every_released_tower_has_the_shapes_of_its_timm_entry(name):
    import timm

    vision = ARCHITECTURES[name].vision
    with torch.device("meta"):
        model = Siglip2(ARCHITECTURES[name])
        entry = timm_format.timm_name(vision)
        reference = timm.create_model(entry, num_classes=0)
    tensors = {f"vision.{n}": x for n, x in model.vision.state_dict().items()}
    ours = export_state(timm_format.vision_rules(vision), tensors)
    shapes = lambda state: {n: tuple(x.shape) for n, x in state.items()}
    assert shapes(ours) == shapes(reference.state_dict())
    assert reference.blocks[0].attn.num_heads == vision.size.num_heads
