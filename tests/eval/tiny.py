"""A tiny model, a stand-in tokenizer, and coloured squares with captions in five languages."""

import json
from pathlib import Path

import torch
from PIL import Image

from siglip2.models import presets
from siglip2.models.siglip2 import Siglip2

COLOURS = {
    "red": ((220, 30, 30), "красный", "أحمر", "红色", "빨강"),
    "green": ((30, 200, 60), "зелёный", "أخضر", "绿色", "초록"),
    "blue": ((30, 60, 220), "синий", "أزرق", "蓝色", "파랑"),
    "black": ((0, 0, 0), "чёрный", "أسود", "黑色", "검정"),
    "white": ((255, 255, 255), "белый", "أبيض", "白色", "하양"),
    "grey": ((128, 128, 128), "серый", "رمادي", "灰色", "회색"),
}
LANGUAGES = ("ru", "ar", "zh", "ko")


def tiny_model() -> Siglip2:
    torch.manual_seed(0)
    model = Siglip2(presets.architecture("siglip2-tiny-patch8-32"))
    model.init_weights()
    return model


def tokenize(texts: list[str]) -> torch.Tensor:  # (B, 64)
    """Bytes as ids, one EOS, zeros: enough of a tokenizer for a vocabulary of 512."""
    ids = torch.zeros(len(texts), 64, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        data = list(text.lower().encode())[:63]
        row[: len(data) + 1] = torch.tensor([*(x + 2 for x in data), 1])
    return ids


def write_folder(folder: Path) -> Path:
    """Two styles of each colour; one rare language names two of the pictures."""
    for number, (name, (rgb, *words)) in enumerate(COLOURS.items()):
        for style in ("flat", "framed"):
            captions = {"en": name, **dict(zip(LANGUAGES, words, strict=True))}
            if number == 0:
                captions["sw"] = "nyekundu"
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGB", (32, 32), "grey" if style == "framed" else rgb)
            picture.paste(rgb, (4, 4, 28, 28))
            picture.save(folder / f"{style}-{name}.png")
            record = {"captions": captions, "group": name, "subset": style}
            (folder / f"{style}-{name}.json").write_text(json.dumps(record), encoding="utf-8")
    return folder
