"""Every released SigLIP 2 architecture as a table, and tiny ones for tests and the quick start.

Sizes: big_vision `decode_variant` and the released checkpoints. g-opt pairs its 1536-wide vision
tower with the So400m text tower; only the text head reaches 1536.
"""

import difflib
from dataclasses import dataclass, replace

from ..config import Pool


@dataclass(frozen=True, kw_only=True)
class TowerSize:
    """Shape of a pre-norm transformer encoder."""

    width: int  # D
    depth: int
    mlp_width: int
    num_heads: int  # H; head width E = D / H


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    size: TowerSize
    patch_size: int  # pixels
    image_size: int  # pixels; NaFlex: the side whose grid the position table has
    is_naflex: bool = False

    @property
    def grid_size(self) -> int:  # G; a remainder of pixels is cropped (So400m/14 at 384: 27)
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    size: TowerSize
    embed_dim: int
    vocab_size: int = 256_000
    length: int = 64  # L
    pool: Pool = "last"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    vision: VisionConfig
    text: TextConfig


_FIXED_QUICK = "siglip2-quickstart-patch8-32"
_TINY = TowerSize(width=64, depth=2, mlp_width=128, num_heads=2)
_QUICK = TowerSize(width=128, depth=3, mlp_width=256, num_heads=2)
_QUICK_TEXT = TowerSize(width=64, depth=2, mlp_width=256, num_heads=1)
_SCENES_TEXT = TowerSize(width=128, depth=2, mlp_width=256, num_heads=2)
_B = TowerSize(width=768, depth=12, mlp_width=3072, num_heads=12)
_L = TowerSize(width=1024, depth=24, mlp_width=4096, num_heads=16)
_SO400M = TowerSize(width=1152, depth=27, mlp_width=4304, num_heads=16)
_G_OPT = TowerSize(width=1536, depth=40, mlp_width=6144, num_heads=16)


def _pair(
    size: TowerSize,
    patch_size: int,
    image_size: int,
    text_size: TowerSize | None = None,
    is_naflex: bool = False,
) -> Architecture:
    vision = VisionConfig(
        size=size, patch_size=patch_size, image_size=image_size, is_naflex=is_naflex
    )
    return Architecture(
        vision=vision, text=TextConfig(size=text_size or size, embed_dim=size.width)
    )


def _table() -> dict[str, Architecture]:
    table = {"siglip2-base-patch32-256": _pair(_B, 32, 256)}
    for name, size, patch, images in (
        ("base", _B, 16, (224, 256, 384, 512)),
        ("large", _L, 16, (256, 384, 512)),
        ("so400m", _SO400M, 14, (224, 384)),
        ("so400m", _SO400M, 16, (256, 384, 512)),
    ):
        for image in images:
            table[f"siglip2-{name}-patch{patch}-{image}"] = _pair(size, patch, image)
    for image in (256, 384):
        table[f"siglip2-giant-opt-patch16-{image}"] = _pair(_G_OPT, 16, image, _SO400M)
    for name, size in (("base", _B), ("so400m", _SO400M)):
        table[f"siglip2-{name}-patch16-naflex"] = _pair(size, 16, 256, is_naflex=True)

    quick = _pair(_QUICK, 8, 32, _QUICK_TEXT)
    table[_FIXED_QUICK] = replace(quick, text=replace(quick.text, vocab_size=8192))
    flexible = _pair(_QUICK, 8, 48, _QUICK_TEXT, is_naflex=True)
    table["siglip2-quickstart-patch8-naflex"] = replace(flexible, text=table[_FIXED_QUICK].text)
    scenes = _pair(_QUICK, 12, 96, _SCENES_TEXT)
    table["siglip2-quickstart-patch12-96"] = replace(
        scenes, text=replace(scenes.text, vocab_size=4096)
    )
    for name, is_naflex in (
        ("siglip2-tiny-patch8-32", False),
        ("siglip2-tiny-patch8-naflex", True),
    ):
        tiny = _pair(_TINY, 8, 32, is_naflex=is_naflex)
        table[name] = replace(tiny, text=replace(tiny.text, vocab_size=512))
    return table


ARCHITECTURES = _table()


def list_models() -> list[str]:
    """Names `create_model` takes."""
    return list(ARCHITECTURES)


def architecture(
    name: str,
    *,
    vocab_size: int | None = None,
    text_length: int | None = None,
    text_pool: Pool | None = None,
) -> Architecture:
    """The architecture called `name`, with its text side overridden where asked.

    A hub prefix such as `google/` is ignored.  Raises ValueError, naming near matches, when
    unknown.
    """
    short = name.rsplit("/", 1)[-1]
    if short not in ARCHITECTURES:
        near = difflib.get_close_matches(short, ARCHITECTURES, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "see siglip2.list_models()"
        raise ValueError(f"unknown model {name!r}; {hint}")
    found = ARCHITECTURES[short]
    asked = {"vocab_size": vocab_size, "length": text_length, "pool": text_pool}
    changes = {key: value for key, value in asked.items() if value is not None}
    return replace(found, text=replace(found.text, **changes))
