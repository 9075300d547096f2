"""Small models whose every parameter matters, and batches for them."""

import torch

from siglip2.data.types import PackedImages
from siglip2.models.presets import Architecture, TextConfig, TowerSize, VisionConfig
from siglip2.models.siglip2 import Siglip2


def tiny_architecture(
    *,
    head_width=8,
    num_heads=2,
    depth=2,
    patch_size=4,
    grid=4,
    is_naflex=False,
    text_width=None,
    pool="last",
    vocab_size=37,
    length=6,
):
    width = head_width * num_heads
    size = TowerSize(width=width, depth=depth, mlp_width=2 * width + 4, num_heads=num_heads)
    text_width = text_width or width
    text = TowerSize(width=text_width, depth=depth + 1, mlp_width=24, num_heads=num_heads)
    vision = VisionConfig(
        size=size, patch_size=patch_size, image_size=patch_size * grid, is_naflex=is_naflex
    )
    text = TextConfig(size=text, embed_dim=width, vocab_size=vocab_size, length=length, pool=pool)
    return Architecture(vision=vision, text=text)


def random_model(architecture, *, seed=0):
    """Zero biases and unit scales would hide a misplaced tensor: everything is random."""
    torch.manual_seed(seed)
    model = Siglip2(architecture)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def double(model):
    model.dtype = torch.float64
    return model.double()


def random_images(grids, patch_size, *, seed=1):  # list of (h * w, P*P*3) float64
    generator = torch.Generator().manual_seed(seed)
    width = 3 * patch_size**2
    shape = lambda h, w: (h * w, width)
    return [
        torch.rand(shape(h, w), generator=generator, dtype=torch.float64) * 2 - 1 for h, w in grids
    ]


def packed(images, grids):
    lengths = torch.tensor([0, *(h * w for h, w in grids)])
    return PackedImages(
        patches=torch.cat(images),
        grid_hw=torch.tensor(grids, dtype=torch.int32).reshape(-1, 2),
        cu_seqlens=lengths.cumsum(0).int(),
        max_seqlen=int(lengths.max()),
    )


def padded(images, grids, *, extra=1, seed=2):
    """transformers' dictionary; padding holds noise, which no output may show."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(len(x) for x in images) + extra
    shape = (len(images), longest, images[0].shape[1])
    pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.zeros(shape[:2], dtype=torch.int64)
    for i, x in enumerate(images):
        pixels[i, : len(x)], mask[i, : len(x)] = x, 1
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor(grids),
    }


def timm_batch(images, grids, *, seed=3):
    """timm's dictionary of the same images."""
    hf = padded(images, grids, seed=seed)
    mask = hf["pixel_attention_mask"].bool()
    coord = torch.zeros(*mask.shape, 2, dtype=torch.int64)
    for i, (h, w) in enumerate(grids):
        coord[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2)
    return {"patches": hf["pixel_values"], "patch_coord": coord, "patch_valid": mask}


def random_tokens(architecture, num=3, *, seed=4):
    """Ids with an end token and padding, as a tokenizer leaves them."""
    generator = torch.Generator().manual_seed(seed)
    text = architecture.text
    tokens = torch.randint(5, text.vocab_size, (num, text.length), generator=generator)
    for i in range(num):
        end = min(2 + i, text.length - 1)
        tokens[i, end:] = 0
        tokens[i, end] = 1
    return tokens
