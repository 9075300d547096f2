"""Generation: what the cache gives is what a whole pass gives."""

import pytest
import torch
from locca.test_decoder import dense, make_decoder

from siglip2.locca.generate import generate
from siglip2.locca.packing import BEGIN

LENGTHS = [5, 1, 12]
EOS = 1


@pytest.fixture
def decoder():
    found = make_decoder()
    with torch.no_grad():  # ends come, but not at once
        found.head_bias[EOS] += 1.0
    return found


def greedy(decoder, vision, prompt):
    """Token by token, each time from the start."""
    text = list(prompt)
    while len(text) < decoder.config.length:
        ids = torch.tensor([BEGIN, *text])
        logits = dense(decoder, ids, vision, causal=True)[-1] @ decoder.head.T + decoder.head_bias
        token = int(logits.argmax())
        if token == EOS:
            break
        text.append(token)
    return text[len(prompt) :]


def test_the_cache_changes_nothing(decoder):
    vision = torch.randn(sum(LENGTHS), 20, dtype=torch.float64)
    prompts = [[4], [7, 8, 9, 10], [2, 3]]
    found = generate(decoder, vision, LENGTHS, prompts, eos_id=EOS)
    with torch.no_grad():
        expected = [
            greedy(decoder, tokens, prompt)
            for tokens, prompt in zip(vision.split(LENGTHS), prompts, strict=True)
        ]
    assert found == expected
    assert len({tuple(text) for text in found}) > 1


def test_a_batch_is_its_images_alone(decoder):
    vision = torch.randn(sum(LENGTHS), 20, dtype=torch.float64)
    prompts = [[4], [7, 8], [2, 3, 5]]
    together = generate(decoder, vision, LENGTHS, prompts, eos_id=EOS)
    alone = [
        generate(decoder, tokens, [len(tokens)], [prompt], eos_id=EOS)[0]
        for tokens, prompt in zip(vision.split(LENGTHS), prompts, strict=True)
    ]
    assert together == alone


def test_drawn_texts_follow_their_generator_and_the_model(decoder):
    vision = torch.randn(400 * 2, 20, dtype=torch.float64).view(400, 2, 20)[:1].expand(400, 2, 20)
    draw = lambda seed, **options: generate(
        decoder,
        vision.reshape(800, 20),
        [2] * 400,
        [[4]] * 400,
        eos_id=EOS,
        max_length=2,
        temperature=1.0,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    assert draw(0) == draw(0) != draw(1)
    with torch.no_grad():
        hidden = dense(decoder, torch.tensor([BEGIN, 4]), vision[0], causal=True)[-1]
        p = (hidden @ decoder.head.T + decoder.head_bias).softmax(-1)
    first = torch.tensor([text[0] if text else EOS for text in draw(2)])
    shares = torch.bincount(first, minlength=31) / 400
    assert (shares - p).abs().max() < 0.1  # four deviations of the commonest
    best = int(p.argmax())
    few = {text[0] if text else EOS for text in draw(3, top_p=float(p.max()) * 0.99)}
    assert few == {best}


def test_wrong_input_is_one_clear_error(decoder):
    vision = torch.randn(3, 20, dtype=torch.float64)
    with pytest.raises(ValueError, match="need a prompt for each image; got 1 for 2"):
        generate(decoder, vision, [2, 1], [[4]], eos_id=EOS)
    with pytest.raises(ValueError, match="need prompts of fewer than 10 tokens; got 10"):
        generate(decoder, vision, [3], [[4] * 10], eos_id=EOS)
    with pytest.raises(ValueError, match=r"top_p in \(0, 1\]; got 0\.0 and 0"):
        generate(decoder, vision, [3], [[4]], eos_id=EOS, top_p=0)
    assert generate(decoder, vision[:0], [], [], eos_id=EOS) == []
