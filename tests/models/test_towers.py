import pytest
import torch
import torch.nn.functional as F
from models.tiny import (
    double,
    packed,
    padded,
    random_images,
    random_model,
    random_tokens,
    timm_batch,
    tiny_architecture,
)

from siglip2.models.inputs import patchify, vision_inputs
from siglip2.models.sequences import kept, uniform

GRIDS = [(4, 4), (2, 7), (1, 1), (6, 3), (2, 7)]
EPS = torch.finfo(torch.float64).eps


@pytest.fixture
def naflex():
    return double(random_model(tiny_architecture(is_naflex=True)))


def assert_equal(a, b):
    """Equal but for the order of sums in float64."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 2**10 * EPS * b.abs().max()


def test_packed_images_do_not_see_one_another(naflex):
    images = random_images(GRIDS, 4)
    together = naflex.forward_vision(packed(images, GRIDS))
    alone = [naflex.forward_vision(packed([x], [g])) for x, g in zip(images, GRIDS, strict=True)]
    assert_equal(together.pooled, torch.cat([out.pooled for out in alone]))
    assert_equal(together.tokens, torch.cat([out.tokens for out in alone]))


def test_order_of_images_is_the_order_of_embeddings(naflex):
    images = random_images(GRIDS, 4)
    turned = packed(images[::-1], GRIDS[::-1])
    expected = naflex.encode_image(packed(images, GRIDS)).flip(0)
    assert_equal(naflex.encode_image(turned), expected)


def test_three_dialects_are_one_batch(naflex):
    images = random_images(GRIDS, 4)
    expected = naflex.encode_image(packed(images, GRIDS))
    assert torch.equal(naflex.encode_image(padded(images, GRIDS)), expected)
    assert torch.equal(naflex.encode_image(timm_batch(images, GRIDS)), expected)


@pytest.mark.parametrize("is_naflex", [False, True], ids=["fixed", "naflex"])
def test_image_tensor_equals_its_patches(is_naflex):
    model = double(random_model(tiny_architecture(is_naflex=is_naflex)))
    image = torch.rand(3, 3, 16, 16, dtype=torch.float64) * 2 - 1
    patches = patchify(image, 4).flatten(1, 2)
    batch = packed(list(patches), [(4, 4)] * 3)
    assert torch.equal(model.encode_image(image), model.encode_image(batch))


def test_uint8_patches_mean_minus_one_to_one(naflex):
    pixels = torch.randint(0, 256, (14, 48), dtype=torch.uint8)
    expected = naflex.encode_image(packed([pixels.double() / 127.5 - 1], [(2, 7)]))
    assert_equal(naflex.encode_image(packed([pixels], [(2, 7)])), expected)


def test_empty_image_pools_nothing_and_disturbs_no_other(naflex):
    images = random_images(GRIDS, 4)
    empty = torch.empty(0, 48, dtype=torch.float64)
    out = naflex.encode_image(packed([images[0], empty, images[1]], [GRIDS[0], (0, 0), GRIDS[1]]))
    expected = naflex.encode_image(packed(images[:2], GRIDS[:2]))
    assert_equal(out[[0, 2]], expected)
    pool = naflex.vision.pool
    assert_equal(out[1], pool.out.bias + pool.mlp(pool.norm(pool.out.bias)))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in naflex.vision.parameters())


def test_gradient_flows_from_tokens_to_every_layer_below_the_pool(naflex):
    images = random_images(GRIDS[:2], 4)
    naflex.forward_vision(packed(images, GRIDS[:2])).tokens.square().sum().backward()
    for name, parameter in naflex.vision.named_parameters():
        if name.startswith("pool."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.any(), name


@pytest.mark.parametrize("pool", ["last", "map"])
def test_checkpointing_recomputes_the_same_gradients(pool):
    architecture = tiny_architecture(is_naflex=True, pool=pool)
    gradients = []
    for enable in (False, True):
        model = random_model(architecture)
        model.set_grad_checkpointing(enable)
        images = [x.float() for x in random_images(GRIDS, 4)]
        image = model.encode_image(packed(images, GRIDS))
        text = model.encode_text(random_tokens(architecture))
        (image.square().sum() + text.square().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], x) for name, x in gradients[1].items())


def test_text_reads_the_last_position_padding_included():
    architecture = tiny_architecture()
    model = double(random_model(architecture))
    text = random_tokens(architecture)
    tower, (B, L) = model.text, text.shape
    hidden = (F.embedding(text, tower.token_embed) + tower.posemb).flatten(0, 1)
    hidden = tower.encoder(hidden, uniform(B, L, hidden.device)).view(B, L, -1)
    assert_equal(model.encode_text(text), tower.head(hidden[:, -1]))
    assert (text[:, -1] == 0).any()
    longer = text.clone()
    longer[:, 0] = 5  # every position attends to every other
    assert not torch.allclose(model.encode_text(longer), model.encode_text(text))


def test_text_map_pool_equals_torch_multi_head_attention():
    architecture = tiny_architecture(pool="map", text_width=24)
    model = double(random_model(architecture))
    text = random_tokens(architecture)
    tower, (B, L) = model.text, text.shape
    hidden = (F.embedding(text, tower.token_embed) + tower.posemb).flatten(0, 1)
    hidden = tower.encoder(hidden, uniform(B, L, hidden.device)).view(B, L, -1)
    pool = tower.pool
    attention = torch.nn.MultiheadAttention(24, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.kv.weight]))
        attention.in_proj_bias.copy_(torch.cat([pool.q.bias, pool.kv.bias]))
        attention.out_proj.weight.copy_(pool.out.weight)
        attention.out_proj.bias.copy_(pool.out.bias)
    read, _ = attention(pool.probe.expand(B, 1, -1), hidden, hidden)
    expected = tower.head((read + pool.mlp(pool.norm(read)))[:, 0])
    assert_equal(model.encode_text(text), expected)


def test_an_adapter_around_a_layer_of_the_mlp_is_called():
    """The fused activation reads fc1's weights; whoever replaces fc1 must not be passed over."""
    model = random_model(tiny_architecture())
    text = random_tokens(model.architecture)
    before = model.encode_text(text)
    for block in model.text.encoder.blocks:
        block.mlp.fc1 = torch.nn.Sequential(block.mlp.fc1, torch.nn.ReLU())
    assert not torch.allclose(model.encode_text(text), before)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
def test_kept_tokens_are_those_of_a_whole_pass(naflex, checkpointing):
    tower = naflex.vision
    tower.encoder.grad_checkpointing = checkpointing
    image = packed(random_images(GRIDS, 4), GRIDS)
    inputs = vision_inputs(image, tower.config, tower.posemb.device)
    lengths = [h * w for h, w in GRIDS]
    # None, one, all and some of an image's tokens, in any order.
    rows = [[5, 0, 11], [], [0], [17, 3], list(range(14))]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    index = torch.tensor([s + i for s, own in zip(starts, rows, strict=True) for i in own])
    needed = kept(index, [len(own) for own in rows], lengths)
    trimmed = tower(*inputs, torch.float64, kept=needed)
    whole = tower(*inputs, torch.float64)
    assert_equal(trimmed.tokens, whole.tokens[index])
    assert_equal(trimmed.pooled[4:], whole.pooled[4:])
    parameters = [p for name, p in tower.named_parameters() if "pool" not in name]
    grads = [
        torch.autograd.grad(tokens.sin().sum(), parameters)
        for tokens in (trimmed.tokens, whole.tokens[index])
    ]
    for ours, theirs in zip(*grads, strict=True):
        assert_equal(ours, theirs)


def test_the_last_block_computes_kept_tokens_alone(naflex):
    tower, seen = naflex.vision, []
    for block in tower.encoder.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    image = packed(random_images(GRIDS, 4), GRIDS)
    inputs = vision_inputs(image, tower.config, tower.posemb.device)
    lengths = [h * w for h, w in GRIDS]
    tower(*inputs, torch.float64, kept=kept(torch.tensor([1, 20]), [1, 1, 0, 0, 0], lengths))
    assert seen == [sum(lengths), 2]
