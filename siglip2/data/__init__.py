"""Sources of images with captions, preprocessing, tokenizers, loaders, the default data set."""

import importlib
from typing import Any

_HOMES = {
    "BadSampleError": "types",
    "EvalBatch": "eval_loader",
    "EvalLoader": "eval_loader",
    "Example": "types",
    "FixedTransform": "images",
    "NaflexTransform": "images",
    "PackedImages": "types",
    "Siglip2Tokenizer": "tokenizer",
    "TrainLoader": "loader",
    "check_tokenizer": "tokenizer",
    "decode_image": "images",
    "get_tokenizer": "tokenizer",
    "naflex_size": "images",
    "open_source": "sources",
    "pack": "images",
    "quickstart_dir": "quickstart",
    "train_tokenizer": "train_tokenizer",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'siglip2.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"siglip2.data.{_HOMES[name]}"), name)
