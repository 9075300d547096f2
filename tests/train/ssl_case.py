"""A task whose last stage is small, and batches for it; for one process and for ranks."""

from dataclasses import replace

import numpy as np
import torch

from siglip2.config import Config, ModelConfig, SelfDistillationConfig, TrainConfig
from siglip2.locca import LocCaLoss
from siglip2.locca.tasks import TaskText
from siglip2.models.decoder import Decoder, decoder_config
from siglip2.models.presets import architecture
from siglip2.models.siglip2 import Siglip2
from siglip2.train.ssl_stage import view_seed
from siglip2.train.task import Siglip2Task

NAME = "siglip2-tiny-patch8-32"
B = 4
SSL = SelfDistillationConfig(
    distillation_weight=1.0,
    masked_weight=0.25,
    prototypes=19,
    hidden_width=24,
    bottleneck=8,
    num_local=2,
    ema_momentum=0.9,
)


def make_config(**changes):
    """`changes` are fields of `ssl`."""
    return Config(
        model=ModelConfig(name=NAME, text_length=8),
        train=TrainConfig(batch_size=B, examples=8 * B, precision="fp32"),
        ssl=replace(SSL, **changes),
    )


def make_task(dtype=torch.float64, *, locca=True):
    torch.manual_seed(0)
    arch = architecture(NAME, text_length=8)
    model = Siglip2(arch, init_bias=-2.0, dtype=dtype)
    model.init_weights()
    decoder = Decoder(decoder_config(arch, length=16))
    decoder.init_weights()
    torch.nn.init.normal_(decoder.own_head, std=0.1)
    return Siglip2Task(model, locca=LocCaLoss(decoder) if locca else None).to(dtype)


def make_batch(step=0, first=0, last=B, dtype=torch.float64):
    g = np.random.default_rng(step)
    image = torch.from_numpy(g.uniform(-1, 1, (B, 3, 32, 32))).to(dtype)
    text = torch.from_numpy(g.integers(5, 500, (B, 8)))
    said = [[TaskText("caption", tuple(g.integers(5, 500, 4 + i).tolist()), 2)] for i in range(B)]
    batch = {"image": image[first:last], "text": text[first:last], "task_texts": said[first:last]}
    return {**batch, "view_seed": view_seed(0, 0, step)}
