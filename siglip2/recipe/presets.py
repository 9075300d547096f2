"""Named runs: each is a function that returns a whole `Config`."""

import difflib
from collections.abc import Callable
from dataclasses import replace

from ..config import (
    Config,
    DataConfig,
    EvalConfig,
    LocCaConfig,
    ModelConfig,
    OptimConfig,
    SelfDistillationConfig,
    TrainConfig,
)
from ..errors import ConfigError


def quickstart() -> Config:
    """From scratch on the embedded data, six minutes on two CPU cores.

    Chosen by mean image-to-text R@1 at equal compute (LOG.md, 2026-11-23).
    """
    return Config(
        model=ModelConfig(
            name="siglip2-quickstart-patch8-32",
            text_length=16,  # 64 costs 3.1 times a step; captions here have a few words
            init_bias=-4.5,  # near -log(2 * batch): negatives start with little loss
        ),
        data=DataConfig(
            train="quickstart:train",
            val={"seen": "quickstart:train", "held_out": "quickstart:heldout"},
            captions_per_image=2,
            keep_groups=True,  # both drawings of a concept in one batch: R@1 0.10 -> 0.17
            random_shift=0.09,  # unseen concepts gain more than seen ones lose
            workers=0,
            cache_images=True,
        ),
        optim=OptimConfig(warmup_examples=20_000),
        train=TrainConfig(
            output_dir="runs/quickstart",
            examples=576_000,
            batch_size=64,
            precision="fp32",
            log_every_steps=100,
            checkpoint_every_steps=1000,
        ),
    )


def finetune() -> Config:
    """A released checkpoint on your own captions: the curation stage's rate, no weight decay."""
    return Config(
        model=ModelConfig(pretrained="google/siglip2-base-patch16-256", grad_checkpointing=True),
        data=DataConfig(train="data/train.csv", val="data/val.csv"),
        optim=OptimConfig(
            lr=1e-5, weight_decay=0.0, warmup_examples=51_200
        ),  # SigLIP 2, section 2.5
        train=TrainConfig(output_dir="runs/finetune", examples=1_000_000, batch_size=256),
    )


def b16_256() -> Config:
    """The published stage A for B/16 at 256 pixels; the paper's batch is 32k over all devices.

    That is 64 devices of 512. On fewer, raise train.batch_size and train.accum_steps together.
    """
    return Config(
        data=DataConfig(train="data/train-{00000..99999}.tar", resampled=True),
        train=TrainConfig(output_dir="runs/b16-256", batch_size=512, compile=True),
    )


def locca_quickstart() -> Config:
    """Sigmoid loss and LocCa from scratch on scenes of drawings, on two CPU cores."""
    return Config(
        model=ModelConfig(
            name="siglip2-quickstart-patch12-96",
            text_length=32,  # a scene of three takes up to 28 tokens
            init_bias=-4.0,
        ),
        data=DataConfig(
            train="scenes:train",
            val={"held_out": "scenes:heldout"},
            workers=0,  # the two cores are busy computing
        ),
        # Three pixels: 33 numbers are learned in a third of the steps that 97 take.
        locca=LocCaConfig(weight=1.0, depth=2, length=48, max_coordinate=32),
        optim=OptimConfig(warmup_examples=6_400),
        train=TrainConfig(
            output_dir="runs/locca-quickstart",
            examples=128_000,
            batch_size=32,
            precision="fp32",
            log_every_steps=100,
            checkpoint_every_steps=1000,
        ),
        eval=EvalConfig(max_images=500),
    )


def ssl_quickstart() -> Config:
    """Sigmoid loss on scenes, its second half with self-distillation and masked prediction."""
    start = locca_quickstart()
    return replace(
        start,
        locca=LocCaConfig(),
        ssl=SelfDistillationConfig(
            start_share=0.5,  # the published 0.8 would leave 800 steps
            distillation_weight=3.0,  # published: 1 and 0.25, which gain less here
            masked_weight=1.0,
            size_factor=1.0,
            prototypes=1024,
            hidden_width=256,
            bottleneck=64,
            balance="sinkhorn",
            ema_momentum=0.996,  # DINO's; 0.966, 0.99 and 0.999 did as well
            num_local=4,  # half the local tokens of 8
            # Other colours on a flat canvas say more than its drawings: then nothing is learned.
            photometric=False,
        ),
        train=replace(start.train, output_dir="runs/ssl-quickstart"),
    )


def naflex_quickstart() -> Config:
    """The quick start at native aspect ratios: packed batches of 16, 36 or 64 patches an image."""
    start = quickstart()
    return replace(
        start,
        model=replace(start.model, name="siglip2-quickstart-patch8-naflex"),
        data=replace(
            start.data,
            patch_budgets=(16, 36, 64),
            max_num_patches=64,
            canvas_aspect=2.0,  # the drawings are square; canvases of 1:2 to 2:1 are not
            random_shift=0.0,  # drawings are anywhere on their canvases
        ),
        train=replace(start.train, output_dir="runs/naflex-quickstart", examples=320_000),
        eval=replace(start.eval, budgets=(9, 16, 25, 36, 49, 64, 100)),
    )


def b16_naflex() -> Config:
    """The published NaFlex stage for B/16 (SigLIP 2, section 2.4.2), from a 256-pixel checkpoint.

    The last tenth of the schedule, stretched 3.75 times. The paper halves the batch at 1,024
    patches; here it is computed in parts, with the loss over all of it.
    """
    return Config(
        model=ModelConfig(name="siglip2-base-patch16-naflex", pretrained="runs/b16-256/export"),
        data=DataConfig(
            train="data/train-{00000..99999}.tar",
            resampled=True,
            patch_budgets=(128, 256, 576, 784, 1024),
            max_tokens=262_144,
        ),
        optim=OptimConfig(warmup_examples=0, cosine_start=0.9),
        train=TrainConfig(
            output_dir="runs/b16-naflex", examples=15_000_000_000, batch_size=512, compile=True
        ),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "quickstart": quickstart,
    "finetune": finetune,
    "b16-256": b16_256,
    "locca-quickstart": locca_quickstart,
    "ssl-quickstart": ssl_quickstart,
    "naflex-quickstart": naflex_quickstart,
    "b16-naflex": b16_naflex,
}


def preset(name: str) -> Config:
    """The preset called `name`.  Raises ConfigError naming near matches."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"presets: {', '.join(PRESETS)}"
        raise ConfigError(f"need a preset's name or a YAML file; got {name!r}; {hint}")
    return PRESETS[name]()
