"""`siglip2 caption` and `siglip2 locate` on a model that was written to disk."""

import re

import pytest
import torch
from PIL import Image

import siglip2
from siglip2.cli import main
from siglip2.data.train_tokenizer import train_tokenizer
from siglip2.errors import CheckpointError
from siglip2.locca import load_decoder, save_decoder
from siglip2.models.decoder import Decoder, decoder_config

TEXTS = ["cap: aref: gcap: a dog : 0 1 2 3 4 5 6 7 8 9", "the red car and a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose decoder says "400 300 450 480" whatever it is asked."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXTS * 20, vocab_size=300, text_length=24)
    model = siglip2.create_model(
        "siglip2-tiny-patch8-32", vocab_size=tokenizer.vocab_size, text_length=24
    )
    siglip2.save_pretrained(model, path, tokenizer=tokenizer)
    torch.manual_seed(0)
    decoder = Decoder(decoder_config(model.architecture, length=24))
    decoder.init_weights()
    save_decoder(decoder, path)
    return path


def say(folder, tokenizer, text, asked):
    """Write a decoder that says `text` after `asked`: places alone decide, one word a place."""
    decoder = load_decoder(folder)
    width = decoder.config.size.width
    ids = [*asked, *tokenizer.encode([text])[0]]
    assert len(ids) <= decoder.config.length <= width
    with torch.no_grad():
        for parameter in decoder.blocks.parameters():
            parameter.zero_()
        decoder.token_embed.zero_()
        decoder.head_bias.zero_()
        decoder.posemb.copy_(torch.eye(decoder.config.length, width))
        decoder.own_head.zero_()
        for place, token in enumerate(ids):
            decoder.own_head[token, place] += 10
    save_decoder(decoder, folder)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (200, 100), "blue").save(path)
    return path


def test_a_saved_decoder_comes_back(folder):
    first, again = load_decoder(folder), load_decoder(folder)
    assert first.config == again.config
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )


def test_captions_are_printed_for_each_picture(folder, picture, capsys):
    tokenizer = siglip2.get_tokenizer(str(folder), text_length=24)
    from siglip2.locca.tasks import prompts

    say(folder, tokenizer, "the red car", prompts("caption", [""], tokenizer)[0])
    assert main(["caption", str(picture), str(picture), "--model", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{picture}: the red car"] * 2


def test_a_box_is_printed_in_pixels_and_drawn(folder, picture, tmp_path, capsys):
    tokenizer = siglip2.get_tokenizer(str(folder), text_length=24)
    from siglip2.locca.tasks import prompts

    say(folder, tokenizer, "100 250 400 500", prompts("refer", ["a dog"], tokenizer)[0])
    out = tmp_path / "found.png"
    argv = ["locate", str(picture), "a dog", "--model", str(folder), "--out", str(out)]
    assert main(argv) == 0
    assert f"{picture}: a dog: 100 20 200 80" in capsys.readouterr().out
    drawn = Image.open(out).convert("RGB")
    assert drawn.size == (200, 100)
    assert drawn.getpixel((100, 50)) != (0, 0, 255)
    assert drawn.getpixel((50, 50)) == (0, 0, 255)


def test_what_is_missing_is_one_line(folder, picture, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(CheckpointError, match=r"no decoder\.json and no decoder\.safetensors"):
        load_decoder(bare)
    for argv, said in (
        (["caption", str(picture), "--model", str(bare)], "need a model with a captioning decoder"),
        (["caption", str(tmp_path / "none.png"), "--model", str(folder)], "cannot read"),
        (["locate", str(picture), " ", "--model", str(folder)], "need a phrase to look for"),
        (
            ["locate", str(picture), "dog", "--model", str(folder), "--out", "x.jpg"],
            "need a name that ends in .png",
        ),
    ):
        assert main(argv) != 0
        err = capsys.readouterr().err
        assert re.search(said, err)
        assert "Traceback" not in err
