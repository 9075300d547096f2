"""A whole NaFlex vision tower on photos of many shapes, as a training step runs it.

Every rival takes the same weights under its own names, and the batch as its own processor or loader
leaves it: padded float patches with masks, or packed bytes.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from siglip2.data.images import naflex_size
from siglip2.data.types import PackedImages
from siglip2.models.inputs import vision_inputs
from siglip2.models.presets import TowerSize, VisionConfig
from siglip2.models.vision import VisionTower
from siglip2.models.weights import hf, timm

from ..case import Case, Cost, Rival
from ..plain_layers import cast
from ..plain_towers import encode_padded, patch_embedding, pool_padded, positions

PATCH_SIZE = 16
BUDGETS = (128, 256, 576, 784, 1024)  # of SigLIP 2, section 2.4.2
# Height and width as COCO's photos have them, most frequent first.
PHOTOS = ((480, 640), (640, 480), (427, 640), (640, 427), (500, 333), (640, 640), (360, 640))
HEADS = {768: 12, 1152: 16}  # of the released towers with NaFlex checkpoints
MLP_WIDTHS = {768: 3072, 1152: 4304}


@cache
def config_of(D: int, depth: int) -> VisionConfig:
    size = TowerSize(
        width=D, depth=depth, mlp_width=MLP_WIDTHS.get(D, 2 * D), num_heads=HEADS.get(D, D // 64)
    )
    return VisionConfig(size=size, patch_size=PATCH_SIZE, image_size=256, is_naflex=True)


def grids_of(B: int, N: int) -> list[tuple[int, int]]:
    """Of photos at budget `N`; 0 means that they take turns at all five budgets."""
    grids = []
    for i in range(B):
        budget = N or BUDGETS[i % len(BUDGETS)]
        h, w = naflex_size(*PHOTOS[i % len(PHOTOS)], PATCH_SIZE, budget)
        grids.append((h // PATCH_SIZE, w // PATCH_SIZE))
    return grids


def make(
    *,
    B: int,
    N: int,
    D: int,
    depth: int,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
) -> list:
    """Packed bytes with their grids, the same padded, and the tower's weights."""
    grids = torch.tensor(grids_of(B, N), dtype=torch.int32)
    lengths = grids.prod(1)
    draw = partial(torch.randint, 0, 256, dtype=torch.uint8, device=device, generator=generator)
    patches = draw((int(lengths.sum()), 3 * PATCH_SIZE**2))
    valid = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, longest)
    padded = torch.zeros(*valid.shape, patches.shape[1], device=device)
    padded[valid.to(device)] = patches.float() / 127.5 - 1
    return [patches, grids, padded, valid.to(device), dtype, *_weights(D, depth, device)]


def _weights(D: int, depth: int, device: str) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = VisionTower(config_of(D, depth))
        tower.init_weights()
        for parameter in tower.parameters():  # zeros would hide an error in a bias
            parameter.data += 0.02 * torch.randn(parameter.shape)
    return [p.detach().to(device).requires_grad_() for p in tower.parameters()]


def _config(weights: tuple[Tensor, ...]) -> VisionConfig:
    """The tower whose weights these are: 12 tensors a block, 18 around them."""
    return config_of(weights[0].shape[-1], (len(weights) - 18) // 12)


@cache
def _meta(build: Callable[[VisionConfig], nn.Module], config: VisionConfig) -> nn.Module:
    with torch.device("meta"):
        return build(config)


def _named(weights: tuple[Tensor, ...]) -> dict[str, Tensor]:
    names = [name for name, _ in _meta(VisionTower, _config(weights)).named_parameters()]
    return dict(zip(names, weights, strict=True))


def siglip2(*, compiled: bool = False) -> Callable[..., Tensor]:
    def tower(state, inputs, dtype):
        model = _meta(VisionTower, _config(tuple(state.values())))
        return functional_call(model, state, (*inputs, dtype)).pooled

    tower = torch.compile(tower) if compiled else tower

    def run(patches, grids, padded, valid, dtype, *weights):
        dtype = weights[0].dtype if weights[0].dtype == torch.float64 else dtype
        lengths = grids.prod(1)
        bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
        image = PackedImages(patches, grids, bounds, int(lengths.max()))
        inputs = vision_inputs(image, _config(weights), patches.device)
        return tower(_named(weights), inputs, dtype)

    return run


def _theirs(build, rules, call, *, compiled: bool, prefix: str = "") -> Callable[..., Tensor]:
    """A library's own tower with our weights under its names, in autocast as its users run it."""

    def tower(state, batch):
        return call(partial(functional_call, _modules[build], state), batch)

    tower = torch.compile(tower) if compiled else tower

    def run(patches, grids, padded, valid, dtype, *weights):
        config = _config(weights)
        _modules[build] = _real(build, config, patches.device)
        named = {f"vision.{name}": x for name, x in _named(weights).items()}
        state = {}
        for rule in rules(config):
            outs = rule.to_theirs([named[name] for name in rule.ours])
            state.update(zip(rule.theirs, outs, strict=True))
        state = {name.removeprefix(prefix): x for name, x in state.items()}
        is_half = dtype in (torch.bfloat16, torch.float16)
        cast = torch.autocast(patches.device.type, dtype=dtype) if is_half else nullcontext()
        with cast:
            return tower(state, (padded, valid, grids))

    return run


_modules: dict[Callable, nn.Module] = {}


@cache
def _real(build: Callable[[VisionConfig], nn.Module], config: VisionConfig, device) -> nn.Module:
    return build(config).to(device)


def _transformers_tower(config: VisionConfig) -> nn.Module:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    size = config.size
    theirs = Siglip2VisionConfig(
        hidden_size=size.width,
        intermediate_size=size.mlp_width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads,
        num_patches=config.grid_size**2,
        patch_size=config.patch_size,
    )
    return Siglip2VisionModel(theirs)


def transformers(*, compiled: bool = False) -> Callable[..., Tensor]:
    def call(model, batch):
        padded, valid, grids = batch
        args = (padded, valid.int(), grids.long())
        return model(args).pooler_output

    return _theirs(
        _transformers_tower, hf.vision_rules, call, compiled=compiled, prefix=hf.VISION_PREFIX
    )


def _timm_tower(config: VisionConfig) -> nn.Module:
    import timm as library

    return library.create_model(timm.timm_name(config), num_classes=0, **timm.model_args(config))


def _coordinates(valid: Tensor, grids: Tensor) -> Tensor:  # (B, longest, 2)
    number = torch.arange(valid.shape[1], device=valid.device)
    width = grids[:, 1:].to(valid.device, non_blocking=True)
    return torch.stack((number // width, number % width), dim=-1) * valid[..., None]


def timm_tower(*, compiled: bool = False) -> Callable[..., Tensor]:
    def call(model, batch):
        padded, valid, grids = batch
        image = {
            "patches": padded, "patch_coord": _coordinates(valid, grids), "patch_valid": valid
        }  # fmt: skip
        return model((image,))

    return _theirs(_timm_tower, timm.vision_rules, call, compiled=compiled)


def padded_tower() -> Callable[..., Tensor]:
    """What transformers does, without its layers of code: for machines that lack it."""

    def run(patches, grids, padded, valid, dtype, *weights):
        dtype = weights[0].dtype if weights[0].dtype == torch.float64 else dtype
        size, w = _config(weights).size, cast(_named(weights), dtype)
        B, N = valid.shape
        x = patch_embedding(w, padded) + _positions(w["posemb"], grids, N).to(dtype)
        x = encode_padded(w, x, size, attn_mask=valid[:, None, None].expand(B, 1, N, N))
        return pool_padded(w, x, size, attn_mask=valid[:, None, None])

    return run


def _positions(table: Tensor, grids: Tensor, longest: int) -> Tensor:  # (B, longest, D)
    rows = [positions(table, h, w) for h, w in grids.tolist()]
    return torch.stack([F.pad(x, (0, 0, 0, longest - len(x))) for x in rows])


def cost(*, B: int, N: int, D: int, depth: int, dtype: torch.dtype) -> dict[str, Cost]:
    lengths = [h * w for h, w in grids_of(B, N)]
    T, pairs, M = sum(lengths), sum(n * n for n in lengths), config_of(D, depth).size.mlp_width
    flops = (
        depth * (2 * T * (4 * D * D + 2 * D * M) + 4 * D * pairs) + 2 * T * 3 * PATCH_SIZE**2 * D
    )
    weights = depth * (4 * D * D + 2 * D * M) * 4
    forward = Cost(flops=flops, num_bytes=weights + depth * 2 * T * D * dtype.itemsize)
    full = Cost(flops=3 * flops, num_bytes=3 * weights + depth * 6 * T * D * dtype.itemsize)
    return {"forward": forward, "full": full}


_SIZES = ((256, 256), (64, 1024), (110, 0))  # about 64k tokens; 0: all five budgets in one batch
_SMALL = {"B": 6, "N": 36, "D": 128, "depth": 2}

CASE = Case(
    x_name="N",
    x_label="patches an image, at most (0: a mix)",
    shapes=[
        _SMALL,
        *({"B": B, "N": N, "D": 768, "depth": 12} for B, N in _SIZES),
        *({"B": B, "N": N, "D": 1152, "depth": 27} for B, N in ((128, 256), (32, 1024))),
    ],
    check_shapes={"cpu": _SMALL, "cuda": {"B": 6, "N": 256, "D": 768, "depth": 2}},
    make=make,
    reference=siglip2(),
    rivals={
        "padded": Rival(build=padded_tower),
        "transformers": Rival(build=transformers, module="transformers", pip="transformers"),
        "transformers-compile": Rival(
            build=partial(transformers, compiled=True), module="transformers", pip="transformers"
        ),
        "timm": Rival(build=timm_tower, module="timm", pip="timm"),
        "timm-compile": Rival(build=partial(timm_tower, compiled=True), module="timm", pip="timm"),
        "siglip2": Rival(build=siglip2, is_ours=True),
        "siglip2-compile": Rival(build=partial(siglip2, compiled=True), is_ours=True),
    },
    cost=cost,
)
