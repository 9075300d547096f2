"""big_vision's initial distributions, each bounded by the sampling error of its estimate."""

import math

import pytest
import torch
from models.tiny import tiny_architecture

from siglip2.models.factory import create_model
from siglip2.models.siglip2 import Siglip2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    architecture = tiny_architecture(
        head_width=64, num_heads=3, patch_size=8, grid=12, pool="map", vocab_size=400, length=40
    )
    made = Siglip2(architecture)
    made.init_weights()
    return made


def assert_std(x, std):
    error = 5 * std / math.sqrt(2 * x.numel())  # five deviations of a normal sample's estimate
    assert abs(x.std() - std) < error
    assert abs(x.mean()) < 5 * std / math.sqrt(x.numel())


def assert_xavier(x, fan_in, fan_out):
    bound = math.sqrt(6 / (fan_in + fan_out))
    assert x.abs().max() <= bound
    assert_std(x, bound / math.sqrt(3))


def assert_lecun(linear):
    std = 1 / math.sqrt(linear.in_features)
    assert_std(linear.weight, std)
    assert linear.weight.abs().max() <= 2 * std / 0.8796  # cut at two deviations before scaling
    assert not linear.bias.any()


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_blocks(model, tower):
    encoder = getattr(model, tower).encoder
    for block in encoder.blocks:
        D = block.attn.out.weight.shape[0]
        for projection in block.attn.qkv.weight.chunk(3):  # each square by itself
            assert_xavier(projection, D, D)
        assert_xavier(block.attn.out.weight, D, D)
        assert not block.attn.qkv.bias.any()
        assert not block.attn.out.bias.any()
        for layer in (block.mlp.fc1, block.mlp.fc2):
            assert_xavier(layer.weight, layer.in_features, layer.out_features)
            assert_std(layer.bias, 1e-6)
    norms = [encoder.norm, *(n for b in encoder.blocks for n in (b.norm1, b.norm2))]
    assert all((n.weight == 1).all() and not n.bias.any() and n.eps == 1e-6 for n in norms)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_map_heads(model, tower):
    pool = getattr(model, tower).pool
    D = pool.probe.shape[-1]
    assert_xavier(pool.probe, 1, D)
    for projection in (pool.q.weight, *pool.kv.weight.chunk(2), pool.out.weight):
        assert_xavier(projection, D, D)
    assert not any(layer.bias.any() for layer in (pool.q, pool.kv, pool.out))
    assert_std(pool.mlp.fc1.bias, 1e-6)


def test_embeddings_and_ends(model):
    assert_std(model.vision.posemb, 1 / math.sqrt(192))
    assert_std(model.text.posemb, 1 / math.sqrt(192))
    assert_std(model.text.token_embed, 1 / math.sqrt(192))
    assert_lecun(model.vision.patch_embed)
    assert_lecun(model.text.head)


def test_temperature_and_bias():
    model = create_model("siglip2-tiny-patch8-32")
    assert model.log_scale.item() == pytest.approx(math.log(10))
    assert model.bias.item() == -10
    model = create_model("siglip2-tiny-patch8-32", init_temperature=1.0, init_bias=-2.5)
    assert (model.log_scale.item(), model.bias.item()) == (0, -2.5)
    out = model(image=torch.zeros(1, 3, 32, 32))
    assert (out["logit_scale"].item(), out["logit_bias"].item()) == (1, -2.5)


def test_seed_decides_the_weights():
    def made(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in create_model("siglip2-tiny-patch8-32").parameters()])

    assert torch.equal(made(0), made(0))
    assert not torch.equal(made(0), made(1))
