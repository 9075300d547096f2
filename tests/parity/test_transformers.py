"""The towers against transformers' `SiglipModel` and `Siglip2Model`: embeddings and every
gradient."""

import pytest
import torch
from models.tiny import (
    double,
    packed,
    padded,
    random_images,
    random_model,
    random_tokens,
    tiny_architecture,
)

from compare import assert_no_worse
from siglip2.models.factory import save_pretrained
from siglip2.models.weights import hf
from siglip2.models.weights.rules import export_state

transformers = pytest.importorskip("transformers", exc_type=ImportError)

HEADS = [
    pytest.param(64, 2, id="head-64"),
    pytest.param(72, 1, id="head-72"),
    pytest.param(96, 1, id="head-96"),
]
GRIDS = [(4, 4), (2, 7), (1, 1), (6, 3)]  # the table's own size, wide, one token, tall


def theirs(model, folder, dtype):
    """transformers' model from what `save_pretrained` wrote."""
    save_pretrained(model, folder)
    loaded, report = transformers.AutoModel.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


def probe_loss(x):
    """A scalar whose gradient differs for every element."""
    return (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum()


def outputs_and_gradients(model, image, text):
    """Embeddings and gradients of ours, under transformers' names."""
    out = {"image": model.encode_image(image), "text": model.encode_text(text)}
    (probe_loss(out["image"]) + probe_loss(out["text"])).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    rules = [r for r in hf.rules(model.architecture) if all(name in gradients for name in r.ours)]
    return {name: x.detach() for name, x in out.items()} | export_state(rules, gradients)


def their_outputs_and_gradients(model, image, text):
    out = {
        "image": model.get_image_features(**image).pooler_output,
        "text": model.get_text_features(input_ids=text).pooler_output,
    }
    (probe_loss(out["image"]) + probe_loss(out["text"])).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in out.items()} | gradients


def assert_equal_in_float64(actual, expected):
    """Both sum in another order, in float64: 2^12 roundings is far below any other formula's
    error."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        if "k_proj.bias" in name:  # softmax ignores a constant: zero but for rounding
            assert max(actual[name].abs().max(), x.abs().max()) < 1e-12
            continue
        allowed = 2**12 * torch.finfo(torch.float64).eps * x.abs().max()
        error = (actual[name] - x).abs().max()
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize(("head_width", "num_heads"), HEADS)
def test_fixed_resolution_equals_siglip_model(head_width, num_heads, tmp_path):
    architecture = tiny_architecture(head_width=head_width, num_heads=num_heads, text_width=24)
    model = random_model(architecture)
    reference = theirs(model, tmp_path, torch.float64)
    assert type(reference).__name__ == "SiglipModel"
    side = architecture.vision.image_size
    image = torch.rand(3, 3, side, side, dtype=torch.float64) * 2 - 1
    text = random_tokens(architecture)
    expected = their_outputs_and_gradients(reference, {"pixel_values": image}, text)
    assert_equal_in_float64(outputs_and_gradients(double(model), image, text), expected)


def test_fixed_resolution_crops_what_the_patches_do_not_cover(tmp_path):
    """So400m/14 at 384 pixels has 27 x 27 patches and 6 pixels to spare."""
    architecture = tiny_architecture(patch_size=5, grid=3)
    model = random_model(architecture)
    image = torch.rand(2, 3, 17, 17, dtype=torch.float64) * 2 - 1
    text = random_tokens(architecture)
    reference = theirs(model, tmp_path, torch.float64)
    expected = their_outputs_and_gradients(reference, {"pixel_values": image}, text)
    assert_equal_in_float64(outputs_and_gradients(double(model), image, text), expected)


@pytest.mark.parametrize(("head_width", "num_heads"), HEADS)
def test_naflex_equals_siglip2_model_without_positions(head_width, num_heads, tmp_path):
    """transformers resamples positions in float32; without them ragged batches compare in
    float64."""
    architecture = tiny_architecture(head_width=head_width, num_heads=num_heads, is_naflex=True)
    model = random_model(architecture)
    torch.nn.init.zeros_(model.vision.posemb)
    reference = theirs(model, tmp_path, torch.float64)
    assert type(reference).__name__ == "Siglip2Model"
    grids = [*GRIDS, (1, 60), (60, 1)]
    images = random_images(grids, architecture.vision.patch_size)
    text = random_tokens(architecture)
    expected = their_outputs_and_gradients(reference, padded(images, grids), text)
    actual = outputs_and_gradients(double(model), packed(images, grids), text)
    for results in (actual, expected):
        results.pop("vision_model.embeddings.position_embedding.weight")
    assert_equal_in_float64(actual, expected)


@pytest.mark.parametrize(("head_width", "num_heads"), HEADS)
def test_naflex_errs_no_more_than_siglip2_model(head_width, num_heads, tmp_path):
    architecture = tiny_architecture(head_width=head_width, num_heads=num_heads, is_naflex=True)
    model = random_model(architecture)
    images = random_images(GRIDS, architecture.vision.patch_size)
    text = random_tokens(architecture)
    runs = {}
    for dtype in (torch.float32, torch.float64):
        reference = theirs(model, tmp_path, dtype)
        inputs = {
            name: x.to(dtype) if x.is_floating_point() else x
            for name, x in padded(images, GRIDS).items()
        }
        runs[dtype] = their_outputs_and_gradients(reference, inputs, text)
    actual = outputs_and_gradients(model, packed([x.float() for x in images], GRIDS), text)
    eager, gold = runs[torch.float32], runs[torch.float64]
    assert actual.keys() == gold.keys()
    for name in gold:
        if "k_proj.bias" in name:  # zero but for rounding
            continue
        assert_no_worse(name, actual[name], eager[name], gold[name], torch.float32)


@pytest.mark.parametrize("is_naflex", [False, True], ids=["fixed", "naflex"])
def test_bfloat16_errs_no_more_than_transformers(is_naflex, tmp_path):
    architecture = tiny_architecture(head_width=64, is_naflex=is_naflex)
    model = random_model(architecture)
    side = architecture.vision.image_size
    text = random_tokens(architecture)
    if is_naflex:
        images = random_images(GRIDS, architecture.vision.patch_size)
        image, inputs = packed(images, GRIDS), padded(images, GRIDS)
    else:
        image = torch.rand(4, 3, side, side, dtype=torch.float64) * 2 - 1
        inputs = {"pixel_values": image}
    features = {}
    for dtype in (torch.bfloat16, torch.float64):
        reference = theirs(model, tmp_path, dtype)
        cast = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
        with torch.no_grad():
            features[dtype] = (
                reference.get_image_features(**cast).pooler_output,
                reference.get_text_features(input_ids=text).pooler_output,
            )
    model.dtype = torch.bfloat16
    with torch.no_grad():
        actual = model.encode_image(image), model.encode_text(text)
    for name, x, eager, gold in zip(
        ("image", "text"), actual, features[torch.bfloat16], features[torch.float64], strict=True
    ):
        assert_no_worse(name, x, eager, gold, torch.bfloat16)


def test_forward_equals_transformers_logits(tmp_path):
    architecture = tiny_architecture()
    model = random_model(architecture)
    reference = theirs(model, tmp_path, torch.float64)
    side = architecture.vision.image_size
    image = torch.rand(2, 3, side, side, dtype=torch.float64) * 2 - 1
    text = random_tokens(architecture)
    with torch.no_grad():
        expected = reference(pixel_values=image, input_ids=text).logits_per_image
        out = double(model)(image=image, text=text)
        logits = out["image_features"] @ out["text_features"].T * out["logit_scale"]
        actual = logits + out["logit_bias"]
    # unit embeddings are float32 by contract
    allowed = 16 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= allowed
