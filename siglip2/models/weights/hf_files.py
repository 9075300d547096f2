"""What transformers needs beside the weights: config, preprocessor and tokenizer files."""

from pathlib import Path
from typing import Any, Protocol

from ...errors import require
from ..layers import LAYER_NORM_EPS
from ..presets import Architecture, TowerSize, VisionConfig
from .files import write_json
from .hf import DEFAULT_ACT, model_type

PAD_ID, EOS_ID, BOS_ID = 0, 1, 2


class SavableTokenizer(Protocol):
    def save(self, folder: str | Path) -> Path: ...


def _size_config(size: TowerSize) -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "hidden_act": DEFAULT_ACT,
        "hidden_size": size.width,
        "intermediate_size": size.mlp_width,
        "layer_norm_eps": LAYER_NORM_EPS,
        "num_attention_heads": size.num_heads,
        "num_hidden_layers": size.depth,
    }


def _config(architecture: Architecture) -> dict[str, Any]:
    vision, text = architecture.vision, architecture.text
    kind = model_type(vision)
    grid = {"num_patches": vision.grid_size**2}
    return {
        "architectures": ["Siglip2Model" if vision.is_naflex else "SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": kind,
        "text_config": {
            **_size_config(text.size),
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "max_position_embeddings": text.length,
            "model_type": f"{kind}_text_model",
            "pad_token_id": PAD_ID,
            "projection_size": text.embed_dim,
            "vocab_size": text.vocab_size,
        },
        "torch_dtype": "float32",
        "vision_config": {
            **_size_config(vision.size),
            **(grid if vision.is_naflex else {"image_size": vision.image_size}),
            "model_type": f"{kind}_vision_model",
            "num_channels": 3,
            "patch_size": vision.patch_size,
            "vision_use_head": True,
        },
    }


def _preprocessor(vision: VisionConfig) -> dict[str, Any]:
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,  # bilinear
        "rescale_factor": 1 / 255,
    }
    if vision.is_naflex:
        return {
            **common,
            "image_processor_type": "Siglip2ImageProcessor",
            "max_num_patches": vision.grid_size**2,
            "patch_size": vision.patch_size,
            "processor_class": "Siglip2Processor",
        }
    return {
        **common,
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "SiglipProcessor",
        "size": {"height": vision.image_size, "width": vision.image_size},
    }


def config_files(architecture: Architecture) -> dict[str, dict[str, Any]]:
    return {
        "config.json": _config(architecture),
        "preprocessor_config.json": _preprocessor(architecture.vision),
    }


def save_tokenizer(tokenizer: SavableTokenizer, folder: Path, text_length: int) -> None:
    """The vocabulary, completed so that transformers' AutoTokenizer gives this library's ids.

    Lower-casing and the end token move into tokenizer.json; the length and right padding into its
    config. A vocabulary that is no tokenizer.json (SentencePiece) is copied as it is. AutoTokenizer
    rebuilds Gemma's splitting for NaFlex models (model_type siglip2) whatever the file says: a
    vocabulary of another kind needs PreTrainedTokenizerFast there.
    """
    path = Path(tokenizer.save(folder))
    if path.name != "tokenizer.json":
        return
    tokenizers: Any = require("tokenizers", "text")
    backend = tokenizers.Tokenizer.from_file(str(path))
    if not _lower_cases_first(backend.normalizer, tokenizers.normalizers):
        steps = [tokenizers.normalizers.Lowercase()]
        if backend.normalizer is not None:
            steps.append(backend.normalizer)
        backend.normalizer = tokenizers.normalizers.Sequence(steps)
    eos, pad = (backend.id_to_token(i) for i in (EOS_ID, PAD_ID))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, EOS_ID)]
    )
    backend.enable_truncation(text_length)
    backend.enable_padding(length=text_length, pad_id=PAD_ID, pad_token=pad)
    backend.save(str(path))
    content = {
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_input_names": ["input_ids"],  # no mask: the model was trained to read its padding
        "model_max_length": text_length,
        "pad_token": pad,
        "padding_side": "right",
        "split_special_tokens": True,  # "<eos>" in a caption is text
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", content)


def _lower_cases_first(normalizer: Any, kinds: Any) -> bool:
    """As an export of ours does: a second one must not wrap it again."""
    return isinstance(normalizer, kinds.Sequence) and isinstance(normalizer[0], kinds.Lowercase)
