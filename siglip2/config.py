"""Every knob of a run, typed and frozen: a field has one reader, a unit and a source.

A preset is a function that returns a `Config` (siglip2/recipe/presets.py); the command line
overrides single fields of it (`siglip2 train --config quickstart --optim.lr 1e-3`).
"""

from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["fp32", "bf16"]
Pool = Literal["last", "map"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which towers, and where their weights come from."""

    name: str = "siglip2-base-patch16-256"  # see siglip2.list_models()
    pretrained: str | None = None  # path or hub id; None starts from random weights
    text_length: int = 64  # tokens; released towers have 64 positions
    text_pool: Pool = "last"  # "last" as released, "map" as the paper says (section 2.1)
    init_temperature: float = 10.0  # exp(log_scale) at the start (SigLIP, section 3.2)
    init_bias: float = -10.0  # logit bias at the start (SigLIP, section 3.2)
    grad_checkpointing: bool = False  # recompute each block in the backward


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """The default data set, built from pip packages: emoji and flags named in 14 languages."""

    concepts: int | None = 768  # concepts to train on; None takes all (about 1,700), for a GPU
    held_out_fraction: float = 0.1  # of the concepts, by family, kept for evaluation
    held_out_styles: tuple[str, ...] = ()  # "twemoji", "openmoji": never trained on, reported apart
    held_out_languages: tuple[
        str, ...
    ] = ()  # such as ("ko", "tr"): never trained on, reported apart
    image_px: int = 72  # side of the stored pictures
    cldr_dir: str | None = None  # folder with the npm CLDR packages: names in 100 languages
    cache_dir: str | None = None  # None: $XDG_CACHE_HOME/siglip2 or ~/.cache/siglip2


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images and captions come from, and how they become a batch."""

    train: str = "quickstart:train"  # tars 'x-{000..007}.tar', folder, .csv, .jsonl, hf:NAME
    val: str | dict[str, str] | None = None  # one source, or name -> source
    tokenizer: str | None = None  # tokenizer.json, .model or hub id; None: the data set's own
    captions_per_image: int = 1  # captions drawn (without replacement) for each image of a batch
    max_num_patches: int = 256  # NaFlex: most patches an image may have where no budget is drawn
    patch_budgets: tuple[int, ...] = ()  # NaFlex: drawn uniformly in training (section 2.4.2)
    budget_mode: Literal["batch", "mixed"] = "batch"  # one for a mini-batch, as published, or each
    max_tokens: int | None = None  # patches a device computes at a time; None: no bound
    canvas_aspect: float = 1.0  # NaFlex: small data sets of square pictures, not in the recipe
    train_num_samples: int | None = None  # samples in one epoch of streamed shards; None: all
    resampled: bool = False  # draw shards with replacement (more readers than shards)
    shuffle_buffer: int = 10_000  # encoded examples held for shuffling, per reader
    workers: int = 4  # reader processes; 0 reads in the training process
    keep_groups: bool = False  # images of one group come in one batch, as positives of one another
    random_shift: float = 0.0  # share of the sides; for small data sets, not in the recipe
    cache_images: bool = False  # keep prepared images in memory (small data sets)
    max_image_pixels: int = 100_000_000  # larger images are skipped before decoding
    image_column: str = "image"  # csv, jsonl and HF data sets
    caption_column: str = "caption"  # text, or a dictionary of language to text
    quickstart: QuickstartConfig = field(default_factory=QuickstartConfig)


@dataclass(frozen=True, kw_only=True)
class LocCaConfig:
    """The captioning decoder (SigLIP 2, section 2.2); a weight of 0 builds none."""

    weight: float = 0.0  # of its loss beside the sigmoid loss; the recipe: 1
    depth: int | None = None  # blocks; None: half the text tower's
    length: int = 64  # tokens of a text; not published, LocCa has 64
    parallel_share: float = 0.5  # captions whose tokens are guessed all at once
    per_token: bool = False  # tokens of a task count alike; published: texts do
    tied_head: bool = False  # not published
    max_coordinate: int = 500  # boxes are whole numbers up to this; LocCa: "up to 500"


@dataclass(frozen=True, kw_only=True)
class SelfDistillationConfig:
    """The last fifth: self-distillation and masked prediction (SigLIP 2, section 2.3).

    A weight of 0 builds none of what its loss needs. Sizes and rates that are not here:
    siglip2/self_distillation/config.py.
    """

    start_share: float = 0.8  # of train.examples seen when the stage begins (section 2.3)
    distillation_weight: float = 0.0  # local views against the teacher's global one; the recipe: 1
    masked_weight: float = 0.0  # hidden patches against the teacher's; the recipe: 0.25
    size_factor: float | None = None  # of both; None: by width as published (B: 0.25, So400m: 1)
    prototypes: int = 65_536  # of each head; not published: SILC's, from memory
    hidden_width: int = 2048  # of the heads' MLPs; not published: DINO's
    bottleneck: int = 256  # width of what is compared with prototypes; not published: DINO's
    ema_momentum: float = 0.966  # of the teacher, a step; not published: SILC's, from memory
    ema_scope: Literal["full", "heads"] = "full"  # section 2.3; "heads": the tower teaches (TIPSv2)
    balance: Literal["centring", "sinkhorn"] = "centring"  # of prototypes; not published
    pack: Literal["all", "branch"] = "all"  # one pass, or one a view kind: a third of the memory
    mask_layout: Literal["random", "blocks"] = "random"  # of hidden patches; not published
    num_local: int = 8  # local views an image (section 2.3)
    photometric: bool = True  # DINO's colours, blur and solarisation; False: views are crops alone


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with the published meaning of weight decay (SigLIP 2, section 2.1)."""

    name: Literal["adamw", "fused_adamw"] = "adamw"  # torch's; ours averages the teacher as it goes
    lr: float = 1e-3  # peak
    beta1: float = 0.9  # not published
    beta2: float = 0.95  # SigLIP, section 4.7: 0.999 is unstable at large batches
    weight_decay: float = 0.1  # torch's AdamW multiplies it by lr: the published 1e-4 at lr 1e-3
    grad_clip_norm: float = 1.0  # global norm
    warmup_examples: int = 655_360_000  # 20,000 steps of 32,768
    min_lr_fraction: float = 0.0  # of the peak, at the end of the cosine
    cosine_start: float = 0.0  # share of the cosine that an earlier stage ran (section 2.4.2: 0.9)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how large, where to."""

    output_dir: str = "runs/siglip2"
    examples: int = 40_000_000_000  # images seen in the whole run (SigLIP 2, section 2.1)
    batch_size: int = 256  # images a device and step
    accum_steps: int = 1  # parts a batch is computed in, for memory; the loss sees it whole
    seed: int = 0
    precision: Precision = "bf16"  # of activations; weights and optimiser state stay float32
    compile: bool = False  # torch.compile the encoders
    resume: str = "auto"  # "auto": continue output_dir if it holds a checkpoint; "never"; or a path
    overwrite: bool = False  # delete what output_dir holds
    on_nonfinite: Literal["raise", "skip"] = "raise"
    log_every_steps: int = 10
    checkpoint_every_steps: int = 1000
    keep_checkpoints: int = 2
    eval_every_steps: int = 0  # 0: at the end only
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()


@dataclass(frozen=True, kw_only=True)
class DistConfig:
    """How the ranks that torchrun starts share the work."""

    strategy: Literal["ddp", "fsdp"] = "ddp"  # "fsdp" shards weights and optimiser state (FSDP2)
    loss: Literal["gather", "ring"] = "gather"  # "ring": memory of the local batch, not the global
    check_shapes: bool = True  # ranks compare shapes in the first step
    timeout_s: int = 600  # a collective that takes longer ends the run


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Zero-shot classification and retrieval."""

    batch_size: int = 256
    max_images: int | None = None  # None: all
    budgets: tuple[int, ...] = ()  # NaFlex: also evaluate at each of these numbers of patches
    chunk_size: int = 4096  # rows of the similarity matrix held at a time
    classes: str | None = None  # JSON file {"classes", "templates"}, or "captions:en": the captions
    activation: Literal["softmax", "sigmoid"] = "softmax"  # of the reported class probability


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    locca: LocCaConfig = field(default_factory=LocCaConfig)
    ssl: SelfDistillationConfig = field(default_factory=SelfDistillationConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    dist: DistConfig = field(default_factory=DistConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
