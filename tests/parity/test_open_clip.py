"""Both towers against open_clip's `CustomTextCLIP`, weights both ways, and open_clip's reader of
big_vision files."""

import pytest
import torch
from models.tiny import double, random_model, random_tokens, tiny_architecture

from siglip2.models.factory import from_pretrained, save_pretrained
from siglip2.models.weights import big_vision, open_clip
from siglip2.models.weights import timm as timm_format
from siglip2.models.weights.files import write_tensors
from siglip2.models.weights.rules import export_state

pytestmark = pytest.mark.usefixtures("parity_environment")


def register_with_timm(vision):
    """An entry of this size, which is what an unusual size needs before open_clip can build it."""
    import timm

    def entry(pretrained=False, **kwargs):
        name = timm_format.timm_name(vision)
        return timm.create_model(name, **timm_format.model_args(vision), **kwargs)

    entry.__name__ = open_clip.vision_entry(vision)
    timm.models.register_model(entry)


def theirs(model, folder):
    """open_clip's model, built and filled by open_clip from what `save_pretrained` wrote."""
    import open_clip as library
    import timm

    if not timm.is_model(open_clip.vision_entry(model.architecture.vision)):
        register_with_timm(model.architecture.vision)
    save_pretrained(model, folder, format="open_clip")
    return library.create_model(f"local-dir:{folder}").eval()


def batch_for(architecture):
    side = architecture.vision.image_size
    image = torch.rand(3, 3, side, side, dtype=torch.float64) * 2 - 1
    return image, random_tokens(architecture)


def test_embeddings_and_gradients_equal_open_clip(tmp_path):
    architecture = tiny_architecture(head_width=72, text_width=24)
    model = random_model(architecture)
    reference = theirs(model, tmp_path).double()
    image, text = batch_for(architecture)
    expected = reference.encode_image(image), reference.encode_text(text)
    double(model)
    actual = model.encode_image(image), model.encode_text(text)
    for embeddings in (expected, actual):
        sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in embeddings).backward()
    scalars = {name: torch.zeros(()) for name in ("log_scale", "bias")}
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    ours = export_state(open_clip.rules(architecture), gradients | scalars)
    pairs = {
        name: (ours[name], p.grad) for name, p in reference.named_parameters() if p.grad is not None
    }
    assert len(pairs) == len(ours) - len(scalars)
    pairs |= {"image": (actual[0], expected[0]), "text": (actual[1], expected[1])}
    for name, (a, b) in pairs.items():
        # 2^12 roundings: any other formula is further off than that
        allowed = 2**12 * torch.finfo(torch.float64).eps * b.abs().max()
        assert (a - b).abs().max() <= allowed, name


@pytest.mark.parametrize("is_naflex", [False, True], ids=["fixed", "naflex"])
def test_forward_equals_open_clip(is_naflex, tmp_path):
    architecture = tiny_architecture(is_naflex=is_naflex)
    model = random_model(architecture)
    reference = theirs(model, tmp_path).double()
    reference.output_dict = True
    image, text = batch_for(architecture)
    with torch.no_grad():
        expected, actual = reference(image, text), double(model)(image, text)
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        # unit embeddings are float32 by contract
        allowed = 4 * torch.finfo(torch.float32).eps * x.abs().max()
        assert (actual[name] - x).abs().max() <= allowed, name


@pytest.mark.parametrize("kind", ["safetensors", "bin", "training-checkpoint"])
def test_open_clip_files_come_back_bit_for_bit(kind, tmp_path):
    from safetensors.torch import save_file

    model = random_model(tiny_architecture(text_width=24))
    reference = theirs(model, tmp_path)
    state = reference.state_dict()
    (tmp_path / open_clip.WEIGHTS).unlink()
    if kind == "safetensors":
        save_file(state, tmp_path / open_clip.WEIGHTS)
    elif kind == "bin":
        torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    else:
        prefixed = {f"module.{name}": x for name, x in state.items()}
        torch.save({"epoch": 3, "state_dict": prefixed}, tmp_path / "epoch_3.pt")
    source = tmp_path / "epoch_3.pt" if kind == "training-checkpoint" else tmp_path
    loaded = from_pretrained(source)
    assert loaded.architecture == model.architecture
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x), name


@pytest.mark.parametrize("prefix", ["", "params/"])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "per-layer"])
def test_open_clip_reads_our_big_vision_files(stacked, prefix, tmp_path):
    """Its converter was written against the released .npz files: a second witness of the layout."""
    from open_clip.convert import load_big_vision_weights

    source, other = (random_model(tiny_architecture(text_width=24), seed=i) for i in (0, 1))
    rules = big_vision.rules(source.architecture, stacked=stacked)
    tensors = export_state(rules, source.state_dict())
    write_tensors(tmp_path / "w.npz", {prefix + name: x for name, x in tensors.items()})
    reference = theirs(other, tmp_path / "other")
    load_big_vision_weights(reference, str(tmp_path / "w.npz"))
    expected = export_state(open_clip.rules(source.architecture), source.state_dict())
    for name, x in reference.state_dict().items():
        assert torch.equal(x, expected[name]), name
