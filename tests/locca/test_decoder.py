"""The packed decoder against dense float64 arithmetic with masks, written out here."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from siglip2.locca.loss import CaptionLoss, LocCaLoss
from siglip2.locca.packing import BEGIN, count_texts, draw_parallel, pack_texts
from siglip2.locca.tasks import ImageTexts, TaskText
from siglip2.models.decoder import Decoder, DecoderConfig, decoder_config
from siglip2.models.presets import TowerSize, architecture

EPS = torch.finfo(torch.float64).eps
LENGTHS = [5, 1, 12]  # vision tokens of each image


def make_decoder(*, biases=True, tied=False, vision_width=20, dtype=torch.float64, vocab_size=31):
    torch.manual_seed(0)
    size = TowerSize(width=16, depth=2, mlp_width=24, num_heads=2)
    config = DecoderConfig(
        size=size,
        vision_width=vision_width,
        vocab_size=vocab_size,
        length=10,
        biases=biases,
        tied_head=tied,
    )
    decoder = Decoder(config)
    decoder.init_weights()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return decoder.to(dtype)


def random_texts(seed=0, vocab_size=31):
    """Three images: all tasks, a caption alone, all tasks."""
    g = np.random.default_rng(seed)
    draw = lambda task, n: TaskText(task, tuple(g.integers(2, vocab_size, n).tolist()), 2)
    return [
        [draw("caption", 7), draw("refer", 6), draw("ground", 9)],
        [draw("caption", 4)],
        [draw("caption", 10), draw("refer", 3), draw("ground", 5)],
    ]


def pack(decoder, texts, *, parallel_share=0.5, seed=0, lengths=LENGTHS, **options):
    rng = np.random.default_rng(seed)
    texts = [draw_parallel(image, parallel_share, rng) for image in texts]
    return pack_texts(texts, lengths, mask_id=decoder.mask_id, **options)


def attend(q, k, v, allowed):
    q, k, v = (x.unflatten(-1, (2, -1)).transpose(0, 1) for x in (q, k, v))  # (H, n, E)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def dense(decoder, ids, vision, *, causal):
    """Hidden states of one text of one image."""
    n = len(ids)
    x = decoder.token_embed[ids] + decoder.posemb[:n]
    allowed = torch.ones(n, n, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    see_all = torch.ones(n, len(vision), dtype=torch.bool)
    for block in decoder.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, -1)
        x = x + block.attn.out(attend(q, k, v, allowed))
        k, v = block.cross.kv(vision).chunk(2, -1)
        x = x + block.cross.out(attend(block.cross.q(block.norm2(x)), k, v, see_all))
        h = F.linear(block.norm3(x), block.mlp.fc1.weight, block.mlp.fc1.bias)
        x = x + block.mlp.fc2(F.gelu(h, approximate="tanh"))
    return decoder.norm(x)


def dense_loss(decoder, texts, vision, packed):
    """Every token's cross entropy, times the packed weights, which a test of their own checks."""
    losses = []
    is_parallel = iter((packed.texts.lookahead > 0).tolist())
    for image, tokens in zip(texts, vision.split(LENGTHS), strict=True):
        for text in image:
            parallel, ids = next(is_parallel), torch.tensor(text.ids)
            inputs = torch.cat([torch.tensor([BEGIN]), ids[:-1]])
            inputs = torch.full_like(ids, decoder.mask_id) if parallel else inputs
            hidden = dense(decoder, inputs, tokens, causal=not parallel)
            logits = hidden @ decoder.head.T + decoder.head_bias
            losses.append(F.cross_entropy(logits, ids, reduction="none"))
    return (torch.cat(losses) * packed.weight).sum()


def gradients(loss, decoder, vision):
    names = [name for name, _ in decoder.named_parameters()]
    grads = torch.autograd.grad(loss, [vision, *decoder.parameters()])
    return dict(zip(["vision", *names], grads, strict=True))


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no-biases"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own-head"])
def test_loss_and_gradients_equal_dense_arithmetic(biases, tied):
    decoder, texts = make_decoder(biases=biases, tied=tied), random_texts()
    vision = torch.randn(sum(LENGTHS), 20, dtype=torch.float64, requires_grad=True)
    packed = pack(decoder, texts, seed=3)
    is_parallel = (packed.texts.lookahead > 0).tolist()
    captions = [i for i, text in enumerate(t for x in texts for t in x) if text.task == "caption"]
    assert 0 < sum(is_parallel[i] for i in captions) < len(captions)
    found = LocCaLoss(decoder)(vision, packed)
    expected = dense_loss(decoder, texts, vision, packed)
    assert found.loss.item() == pytest.approx(expected.item(), rel=2**12 * EPS)
    ours, theirs = (gradients(x, decoder, vision) for x in (found.loss, expected))
    for name, x in theirs.items():
        assert (ours[name] - x).abs().max() <= 2**14 * EPS * x.abs().max(), name


def test_one_pass_equals_a_pass_for_each_text():
    decoder, texts = make_decoder(), random_texts()
    vision = torch.randn(sum(LENGTHS), 20, dtype=torch.float64)
    packed = pack(decoder, texts, parallel_share=0.0)
    together = decoder(packed.texts, vision)
    apart = []
    for image, tokens in zip(texts, vision.split(LENGTHS), strict=True):
        for text in image:
            alone = pack(decoder, [[text]], parallel_share=0.0, lengths=[len(tokens)])
            apart.append(decoder(alone.texts, tokens))
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-12, atol=1e-12)


def test_a_causal_text_does_not_see_what_follows_a_parallel_one_does():
    decoder = make_decoder()
    vision = torch.randn(4, 20, dtype=torch.float64)
    ids = [5, 6, 7, 8, 9, 10]
    changed = [5, 6, 7, 8, 20, 10]
    for share, sees in ((0.0, False), (1.0, False)):
        outs = [
            decoder(
                pack(
                    decoder, [[TaskText("caption", tuple(x), 1)]], parallel_share=share, lengths=[4]
                ).texts,
                vision,
            )
            for x in (ids, changed)
        ]
        assert torch.equal(outs[0][:5], outs[1][:5]) != sees
    # Guessed at once, tokens differ by their places alone, and each sees the last place.
    parallel = pack(
        decoder, [[TaskText("caption", tuple(ids), 1)]], parallel_share=1.0, lengths=[4]
    )
    assert set(parallel.texts.ids.tolist()) == {decoder.mask_id}
    moved = parallel.texts._replace(positions=torch.tensor([0, 1, 2, 3, 4, 9]))
    assert not torch.allclose(decoder(parallel.texts, vision)[0], decoder(moved, vision)[0])


def test_weights_are_those_of_the_paper():
    decoder, texts = make_decoder(), random_texts()
    packed = pack(decoder, texts)
    for number in range(3):
        assert packed.weight[packed.task == number].sum().item() == pytest.approx(1.0)
    first = packed.weight[:7]
    assert torch.equal(first[:2], torch.zeros(2))  # the prefix
    torch.testing.assert_close(first[2:], torch.full((5,), 1 / 3 / 5))
    assert packed.counted.tolist() == torch.nonzero(packed.weight)[:, 0].tolist()
    per_token = pack(decoder, texts, per_token=True)
    assert len(set(per_token.weight[per_token.counted][:5].tolist())) == 1
    captions = per_token.weight[per_token.task == 0]
    assert captions[captions > 0].unique().numel() == 1


@pytest.mark.parametrize("lengths", [LENGTHS, [12, 0, 12], [12] * 3], ids=str)
def test_padding_of_vision_tokens_is_not_read(lengths):
    decoder = make_decoder()
    packed = pack(decoder, random_texts(), lengths=lengths)
    padded = torch.randn(3, 12, 20, dtype=torch.float64)
    rows = torch.cat([image[:n] for image, n in zip(padded, lengths, strict=True)])
    for image, n in zip(padded, lengths, strict=True):
        image[n:] = torch.nan
    loss = LocCaLoss(decoder)
    results = []
    for vision in (padded.requires_grad_(), rows.requires_grad_()):
        found = loss(vision, packed).loss
        results.append((found, torch.autograd.grad(found, vision)[0]))
    (found, padded_grad), (expected, grad) = results
    assert torch.equal(found, expected)
    taken = torch.arange(12) < torch.tensor(lengths)[:, None]
    assert torch.equal(padded_grad[taken], grad)
    assert not padded_grad[~taken].any()


def test_initial_loss_is_the_log_of_the_vocabulary():
    decoder = make_decoder()
    decoder.init_weights()
    vision = torch.randn(sum(LENGTHS), 20, dtype=torch.float64)
    found = LocCaLoss(decoder)(vision, pack(decoder, random_texts()))
    assert found.loss.item() == pytest.approx(3 * math.log(31))


class Words:
    """Words as tokens."""

    eos_id = 1

    def __init__(self):
        self.known = {}

    def encode(self, texts):
        return [
            [*(self.known.setdefault(w, 2 + len(self.known)) for w in t.lower().split()), 1]
            for t in texts
        ]


def test_captions_alone_leave_two_tasks_out():
    decoder = make_decoder()
    loss = CaptionLoss(decoder, parallel_share=0.0)
    packed = loss.pack(["a dog", "two cats there"], [2, 3], Words(), rng=np.random.default_rng(0))
    assert packed.task.unique().tolist() == [0]
    assert packed.target.tolist()[:4] == [2, 3, 4, 1]
    found = loss(torch.randn(5, 20, dtype=torch.float64), packed)
    assert found.loss.isfinite()
    assert 0 <= found.token_accuracy <= 1


def test_an_image_without_box_counts_in_captioning_only():
    decoder = make_decoder()
    words = [ImageTexts("a dog", "dog", (0.0, 0.0, 0.5, 1.0)), ImageTexts("a cat", phrase="cat")]
    packed = LocCaLoss(decoder).pack(words, [2, 3], Words(), rng=np.random.default_rng(0))
    assert packed.texts.images.cu_seqlens.tolist()[1] > 4
    counts = [int((packed.texts.positions[packed.task == i] == 0).sum()) for i in range(3)]
    assert counts == [2, 1, 1]


@pytest.mark.parametrize("per_token", [False, True])
def test_parts_of_a_batch_sum_to_the_whole(per_token):
    decoder, texts = make_decoder(), random_texts()
    loss = LocCaLoss(decoder, per_token=per_token)
    vision, totals = torch.randn(sum(LENGTHS), 20, dtype=torch.float64), count_texts(texts)
    whole = loss(vision, loss.pack_tokens(texts, LENGTHS)).loss
    parts = 0.0
    for i, tokens in enumerate(vision.split(LENGTHS)):
        packed = loss.pack_tokens([texts[i]], [LENGTHS[i]], totals=totals)
        parts += loss(tokens, packed).loss
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)


def test_wrong_input_is_one_clear_error():
    decoder = make_decoder()
    loss, rng = LocCaLoss(decoder), np.random.default_rng(0)
    with pytest.raises(
        ValueError, match="need texts and vision tokens of as many images; got 1 and 2"
    ):
        loss.pack([ImageTexts("a")], [2, 3], Words(), rng=rng)
    bad = ImageTexts("a", "b", (0.5, 0.0, 0.2, 1.0))
    with pytest.raises(ValueError, match=r"image 1: need a box \(x0, y0, x1, y1\)"):
        loss.pack([ImageTexts("a"), bad], [2, 3], Words(), rng=rng)
    packed = loss.pack([ImageTexts("a")], [2], Words(), rng=rng)
    needed = r"need vision tokens \(2, 20\), or \(1, N, 20\) of N >= 2; got "
    for shape in ((2, 7), (3, 20), (2, 2, 20), (1, 1, 20), (1, 2, 7)):
        with pytest.raises(ValueError, match=needed + re.escape(str(shape))):
            loss(torch.zeros(shape), packed)


def test_published_shapes():
    base = decoder_config(architecture("siglip2-base-patch16-256"))
    assert (base.size.depth, base.size.width, base.vision_width) == (6, 768, 768)
    so400m = decoder_config(architecture("siglip2-so400m-patch16-naflex"))
    assert (so400m.size.depth, so400m.size.mlp_width) == (13, 4304)
    giant = decoder_config(architecture("siglip2-giant-opt-patch16-256"))
    assert (giant.size.width, giant.vision_width) == (1152, 1536)
    with torch.device("meta"):
        cross = Decoder(giant).blocks[0].cross
    assert cross.kv.weight.shape == (2 * 1152, 1536)
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(base).parameters()) == pytest.approx(
            450.1e6, rel=2e-3
        )


def test_nothing_of_tokens_by_vocabulary_is_kept():
    V = 50_000
    decoder = make_decoder(dtype=torch.float32, vocab_size=V)
    texts = random_texts(vocab_size=V)
    packed = pack(decoder, texts)
    vision = torch.randn(sum(LENGTHS), 20)
    saved = {}

    def note(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    known = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        LocCaLoss(decoder)(vision, packed)
    kept = sum(n for pointer, n in saved.items() if pointer not in known)
    # The head's gradient, V x D and V in float32, is made in the forward; logits would be T x V.
    assert kept < 4 * V * (16 + 1) + 4 * len(packed.target) * V // 4
