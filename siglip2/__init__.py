"""Train SigLIP 2 in PyTorch: the whole recipe on fused Triton and CUDA kernels."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that holds it. Loaded on first use, so that `import siglip2` adds nothing
# to torch's own import.
_PUBLIC = {
    "list_models": "siglip2.models.presets",
    "create_model": "siglip2.models.factory",
    "create_model_and_transforms": "siglip2.models.factory",
    "from_pretrained": "siglip2.models.factory",
    "save_pretrained": "siglip2.models.factory",
    "Siglip2": "siglip2.models.siglip2",
    "get_tokenizer": "siglip2.data.tokenizer",
    "SigLipLoss": "siglip2.losses",
    "Siglip2Task": "siglip2.train.task",
    "TrainStep": "siglip2.train.step",
    "train": "siglip2.train.trainer",
    "zero_shot_classifier": "siglip2.eval.zero_shot",
    "Config": "siglip2.config",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'siglip2' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
