"""A small decoder of random weights on composed scenes."""

from functools import cache

import torch
from data.test_scenes import Squares

import siglip2
from siglip2.data.images import FixedTransform
from siglip2.data.scenes import Scenes
from siglip2.data.train_tokenizer import train_tokenizer
from siglip2.eval.locca import make_speaker
from siglip2.locca.commands import Speaker
from siglip2.models.decoder import Decoder, decoder_config

LENGTH = 64
PROMPTS = "cap: aref: gcap: : 0 1 2 3 4 5 6 7 8 9"


def scenes(count: int = 7) -> Scenes:
    return Scenes(Squares(), count=count, canvas_px=60, held_out=True)


@cache
def speaker() -> Speaker:
    """Every token is about as likely as any other."""
    source = scenes()
    texts = [text for i in range(len(source)) for text in source[i].captions.values()]
    tokenizer = train_tokenizer([*texts, *[PROMPTS] * 20], vocab_size=400, text_length=LENGTH)
    torch.manual_seed(0)
    model = siglip2.create_model(
        "siglip2-tiny-patch8-32", vocab_size=tokenizer.vocab_size, text_length=16
    )
    decoder = Decoder(decoder_config(model.architecture, length=LENGTH))
    decoder.init_weights()
    with torch.no_grad():
        decoder.own_head.normal_()
    return make_speaker(model, decoder, tokenizer, FixedTransform(32))
