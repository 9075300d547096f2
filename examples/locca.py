"""Train a vision tower and LocCa's decoder from scratch on scenes of drawings, then find boxes.

python examples/locca.py [--steps 4000] [--out runs/locca]
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.progress import track

import siglip2
from siglip2.data.images import FixedTransform
from siglip2.data.sources import open_source
from siglip2.eval.localization import accuracy_at, best_constant_accuracy
from siglip2.locca import ImageTexts, LocCaLoss, text_to_box
from siglip2.locca.generate import generate
from siglip2.locca.tasks import prompts
from siglip2.models.decoder import Decoder, DecoderConfig
from siglip2.models.inputs import vision_inputs
from siglip2.models.presets import TowerSize, VisionConfig
from siglip2.models.vision import VisionTower

SIDE, PATCH, BATCH, LENGTH = 96, 12, 32, 40
TOKENS = (SIDE // PATCH) ** 2
SIZE = TowerSize(width=128, depth=3, mlp_width=256, num_heads=2)


class Model(torch.nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.vision = VisionTower(VisionConfig(size=SIZE, patch_size=PATCH, image_size=SIDE))
        config = DecoderConfig(size=SIZE, vision_width=128, vocab_size=vocab_size, length=LENGTH)
        self.locca = LocCaLoss(Decoder(config))
        self.vision.init_weights()
        self.locca.decoder.init_weights()

    def see(self, images: torch.Tensor) -> torch.Tensor:  # (B, 3, S, S) -> (B * TOKENS, 128)
        device = self.vision.posemb.device
        return self.vision(*vision_inputs(images, self.vision.config, device)).tokens


def describe(example, rng: random.Random) -> ImageTexts:
    """A caption and a region, each in a language of its own."""
    region = rng.choice(example.regions)
    phrase = region.phrases[rng.choice(sorted(example.captions))]
    return ImageTexts(rng.choice(list(example.captions.values())), phrase, region.box)


def train(model: Model, source, tokenizer, steps: int) -> None:
    transform, rng, drawn = FixedTransform(SIDE), random.Random(0), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    for step in track(range(steps), "training"):
        examples = [source[(step * BATCH + i) % len(source)] for i in range(BATCH)]
        images = transform.collate([transform.prepare(example.image) for example in examples])
        words = [describe(example, rng) for example in examples]
        packed = model.locca.pack(words, [TOKENS] * BATCH, tokenizer, rng=drawn)
        found = model.locca(model.see(images), packed)
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {found.loss:.3f}, tokens {found.token_accuracy:.3f}")


@torch.no_grad()
def locate(model: Model, source, tokenizer, number: int) -> tuple[list, list]:
    """Predicted and true boxes of one region of each of `number` scenes, asked for in English."""
    transform, rng = FixedTransform(SIDE), random.Random(1)
    predicted, true = [], []
    for start in range(0, number, BATCH):
        examples = [source[i] for i in range(start, min(start + BATCH, number))]
        images = transform.collate([transform.prepare(example.image) for example in examples])
        regions = [rng.choice(example.regions) for example in examples]
        given = prompts("refer", [region.phrases["en"] for region in regions], tokenizer)
        lengths = [TOKENS] * len(examples)
        texts = generate(
            model.locca.decoder, model.see(images), lengths, given, eos_id=tokenizer.eos_id
        )
        predicted += [text_to_box(tokenizer.decode(ids)) for ids in texts]
        true += [region.box for region in regions]
    return predicted, true


def draw(source, predicted: list, true: list, path: Path, number: int = 12) -> None:
    """Scenes with true boxes in green and predicted ones in red."""
    sheet = Image.new("RGB", (6 * 2 * SIDE, (number + 5) // 6 * 2 * SIDE), "white")
    for i in range(min(number, len(true))):
        scene = Image.fromarray(source.scene(i).pixels).resize((2 * SIDE, 2 * SIDE))
        pen = ImageDraw.Draw(scene)
        for box, colour in ((true[i], "green"), (predicted[i], "red")):
            if box is not None:
                pen.rectangle([2 * SIDE * c for c in box], outline=colour, width=2)
        sheet.paste(scene, (i % 6 * 2 * SIDE, i // 6 * 2 * SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--scenes", type=int, default=512, help="held-out scenes to look at")
    parser.add_argument("--out", type=Path, default=Path("runs/locca"))
    args = parser.parse_args()
    torch.manual_seed(0)
    source, held_out = open_source("scenes:train"), open_source("scenes:heldout")
    tokenizer = siglip2.get_tokenizer(str(source.tokenizer_path), text_length=LENGTH)
    model = Model(tokenizer.vocab_size)
    train(model, source, tokenizer, args.steps)
    predicted, true = locate(model, held_out, tokenizer, args.scenes)
    boxes = torch.tensor(true)
    print(f"Acc@0.5 {accuracy_at(predicted, boxes):.3f} on {len(true)} held-out scenes;")
    print(f"the best single box for all reaches {best_constant_accuracy(boxes):.3f}")
    draw(held_out, predicted, true, args.out / "boxes.png")
    print(f"boxes are drawn in {args.out / 'boxes.png'}")


if __name__ == "__main__":
    main()
