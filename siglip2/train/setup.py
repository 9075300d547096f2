"""From a config to the objects of a run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import Config, DataConfig, LocCaConfig, SelfDistillationConfig
from ..data.budgets import Budgets, attention_tokens
from ..errors import ConfigError
from ..locca import LocCaLoss, TextDraws
from ..losses import SigLipLoss
from ..models.decoder import Decoder, decoder_config
from ..models.factory import create_model
from ..models.presets import architecture
from ..models.siglip2 import Siglip2
from ..recipe.schedules import warmup_cosine
from .task import Siglip2Task

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_tokenizer(config: Config, source: Any) -> Any:
    """The tokenizer asked for, the pretrained model's, or the data set's own, in that order."""
    from ..data.tokenizer import get_tokenizer

    pretrained = config.model.pretrained
    if config.data.tokenizer:
        where = config.data.tokenizer
    elif pretrained and (
        not Path(pretrained).exists() or (Path(pretrained) / "tokenizer.json").exists()
    ):
        where = pretrained
    elif getattr(source, "tokenizer_path", None):
        where = source.tokenizer_path
    else:
        raise ConfigError(
            f"data.tokenizer: {config.data.train!r} brings no tokenizer; pass a tokenizer.json, a"
            " SentencePiece .model, or a hub id such as google/siglip2-base-patch16-256"
        )
    return get_tokenizer(str(where), text_length=config.model.text_length)


def build_model(config: Config, vocab_size: int, device: torch.device) -> Siglip2:
    """The towers of `config.model`; a vocabulary of the data set's own sets the table's size."""
    model = config.model
    return create_model(
        model.name,
        pretrained=model.pretrained,
        vocab_size=None if model.pretrained else vocab_size,
        text_length=model.text_length,
        text_pool=model.text_pool,
        init_temperature=model.init_temperature,
        init_bias=model.init_bias,
        dtype=DTYPES[config.train.precision],
        device=device,
    )


def build_task(model: Siglip2, config: Config) -> Siglip2Task:
    """The model under its objectives; embeddings travel unnormalised, in the towers' dtype."""
    dist = config.dist
    loss = SigLipLoss(dist_impl=dist.loss, normalize=True, check_shapes=dist.check_shapes)
    loss.arrival_timeout_s = dist.timeout_s
    locca = _build_locca(model, config.locca)
    return Siglip2Task(model, loss=loss, locca=locca, locca_weight=config.locca.weight)


def _build_locca(model: Siglip2, locca: LocCaConfig) -> LocCaLoss | None:
    """A decoder of random weights: none is released. None where it has no weight."""
    if not locca.weight:
        return None
    changes = {} if locca.depth is None else {"depth": locca.depth}
    shape = decoder_config(
        model.architecture,
        length=locca.length,
        tied_head=locca.tied_head,
        max_coordinate=locca.max_coordinate,
    )
    with torch.device(model.device):
        decoder = Decoder(replace(shape, size=replace(shape.size, **changes)))
    if model.device.type != "meta":
        decoder.init_weights()
    return LocCaLoss(decoder, parallel_share=locca.parallel_share, per_token=locca.per_token)


def build_text_draws(config: Config, tokenizer: Any) -> TextDraws | None:
    """What the decoder is asked about each image of a batch; None without a decoder."""
    locca = config.locca
    if not locca.weight:
        return None
    return TextDraws(
        tokenizer,
        length=locca.length,
        parallel_share=locca.parallel_share,
        max_coordinate=locca.max_coordinate,
    )


def build_transform(model: Siglip2, data: DataConfig) -> Any:
    """Encoded bytes -> what the vision tower takes: fixed squares, or NaFlex patches."""
    from ..data.images import FixedTransform, NaflexTransform

    vision = model.architecture.vision
    if vision.is_naflex:
        return NaflexTransform(
            vision.patch_size,
            data.max_num_patches,
            canvas_aspect=data.canvas_aspect,
            max_image_pixels=data.max_image_pixels,
        )
    return FixedTransform(vision.image_size, max_image_pixels=data.max_image_pixels)


def build_budgets(config: Config, *, world_size: int) -> Budgets | None:
    """What `data.patch_budgets` asks for; None without."""
    if not config.data.patch_budgets:
        return None
    size = architecture(config.model.name).vision.size
    return Budgets(
        config.data.patch_budgets,
        mode=config.data.budget_mode,
        batch_size=config.train.batch_size,
        world_size=world_size,
        seed=config.train.seed,
        max_tokens=config.data.max_tokens,
        attention_tokens=attention_tokens(size.width, size.mlp_width),
    )


def build_schedule(config: Config) -> Callable[[float], float]:
    """Share of the peak learning rate at so many examples seen."""
    optim, total = config.optim, config.train.examples
    return lambda examples: warmup_cosine(
        examples,
        warmup=optim.warmup_examples,
        total=total,
        floor=optim.min_lr_fraction,
        start=optim.cosine_start,
    )


def check(config: Config) -> None:
    """Refuse settings that cannot work, all at once.  Raises ConfigError."""
    train, data = config.train, config.data
    faults = []
    for name, value in (
        ("train.batch_size", train.batch_size),
        ("train.accum_steps", train.accum_steps),
        ("train.examples", train.examples),
        ("train.log_every_steps", train.log_every_steps),
        ("train.checkpoint_every_steps", train.checkpoint_every_steps),
        ("train.keep_checkpoints", train.keep_checkpoints),
        ("data.captions_per_image", data.captions_per_image),
        ("model.init_temperature", config.model.init_temperature),
        ("optim.lr", config.optim.lr),
        ("dist.timeout_s", config.dist.timeout_s),
        ("locca.length", config.locca.length),
        ("locca.max_coordinate", config.locca.max_coordinate),
        ("locca.depth", 1 if config.locca.depth is None else config.locca.depth),
    ):
        if value <= 0:
            faults.append(f"{name}: need more than 0; got {value}")
    for name, value in (
        ("optim.warmup_examples", config.optim.warmup_examples),
        ("optim.weight_decay", config.optim.weight_decay),
        ("optim.grad_clip_norm", config.optim.grad_clip_norm),
        ("data.workers", data.workers),
        ("locca.weight", config.locca.weight),
    ):
        if value < 0:
            faults.append(f"{name}: need 0 or more; got {value}")
    if train.accum_steps > max(train.batch_size, 1):
        faults.append(
            f"train.accum_steps: need at most train.batch_size={train.batch_size};"
            f" got {train.accum_steps}"
        )
    if not 0 <= config.locca.parallel_share <= 1:
        faults.append(f"locca.parallel_share: need 0 to 1; got {config.locca.parallel_share}")
    faults += _ssl_faults(config.ssl)
    try:
        vision = architecture(config.model.name).vision
    except ValueError as error:
        faults.append(f"model.name: {error}")
    else:
        faults += _naflex_faults(config, is_naflex=vision.is_naflex)
    if faults:
        raise ConfigError("; ".join(faults))


def _ssl_faults(ssl: SelfDistillationConfig) -> list[str]:
    faults = []
    for name in ("prototypes", "hidden_width", "bottleneck", "size_factor"):
        value = getattr(ssl, name)
        if value is not None and value <= 0:
            faults.append(f"ssl.{name}: need more than 0; got {value}")
    for name in ("distillation_weight", "masked_weight", "num_local"):
        if getattr(ssl, name) < 0:
            faults.append(f"ssl.{name}: need 0 or more; got {getattr(ssl, name)}")
    for name in ("start_share", "ema_momentum"):
        if not 0 <= getattr(ssl, name) <= 1:
            faults.append(f"ssl.{name}: need 0 to 1; got {getattr(ssl, name)}")
    if ssl.distillation_weight > 0 and ssl.num_local == 0:
        faults.append(
            "ssl.num_local: need 1 or more with ssl.distillation_weight; got 0. Masked prediction"
            " alone needs none: set ssl.distillation_weight=0"
        )
    return faults


def _naflex_faults(config: Config, *, is_naflex: bool) -> list[str]:
    """What is wrong with settings that only NaFlex models have."""
    data, faults = config.data, []
    asked = {
        "data.patch_budgets": data.patch_budgets,
        "data.max_tokens": data.max_tokens,
        "data.canvas_aspect": data.canvas_aspect != 1,
        "eval.budgets": config.eval.budgets,
    }
    if not is_naflex:
        faults += [
            f"{name}: {config.model.name} has a fixed resolution; it is for '-naflex' models"
            for name, value in asked.items()
            if value
        ]
    if data.max_tokens is not None and not data.patch_budgets:
        faults.append("data.max_tokens: needs data.patch_budgets")
    if min((data.max_num_patches, *data.patch_budgets, *config.eval.budgets)) < 1:
        faults.append("data.max_num_patches, data.patch_budgets, eval.budgets: need 1 or more")
    if data.canvas_aspect < 1:
        faults.append(f"data.canvas_aspect: need 1 or more; got {data.canvas_aspect}")
    if not 0 <= config.optim.cosine_start < 1:
        faults.append(f"optim.cosine_start: need 0 to 1; got {config.optim.cosine_start}")
    return faults
