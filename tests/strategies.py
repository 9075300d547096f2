"""What kernel tests run on: backends with their tier, dtypes, and shapes that have names."""

import pytest
import torch
import torch.nn.functional as F

# (backend, device). Tiers that cannot run here are skipped with a reason, never left out.
RUNNERS = [
    pytest.param("chunked", "cpu", id="chunked-cpu"),
    pytest.param("triton", "cpu", id="triton-cpu", marks=pytest.mark.interpreter),
    pytest.param("cublas", "cpu", id="cublas-cpu", marks=pytest.mark.interpreter),
    pytest.param("chunked", "cuda", id="chunked-cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu),
    pytest.param("cublas", "cuda", id="cublas-cuda", marks=pytest.mark.gpu),
]


def runners_and_dtypes() -> list:
    """(backend, device, dtype): the interpreter has no bfloat16 products, Triton no float64."""
    half = {"float32": torch.float32, "float16": torch.float16}
    both = half | {"bfloat16": torch.bfloat16}
    dtypes = {
        ("chunked", "cpu"): both | {"float64": torch.float64},
        ("triton", "cpu"): half,
        ("cublas", "cpu"): half,
        ("chunked", "cuda"): both,
        ("triton", "cuda"): both,
        ("cublas", "cuda"): both,
    }
    return [
        pytest.param(*runner.values, dtype, id=f"{runner.id}-{name}", marks=runner.marks)
        for runner in RUNNERS
        for name, dtype in dtypes[runner.values].items()
    ]


# (B, M, D) of two-tower ops. The tiles of all backends divide 128; the ragged sizes do not.
PAIR_SHAPES = {
    "one-pair": (1, 1, 16),
    "one-tile": (128, 128, 64),
    "ragged": (131, 259, 40),
    "tall": (300, 5, 72),
    "wide": (3, 400, 33),
    "so400m": (130, 140, 1152),
}

# Sequence lengths of packed ops.
LENGTHS = {
    "one-token": [1],
    "one-tile": [64],
    "ragged": [1, 63, 65, 130, 7],
    "empty-sequence": [0, 5, 0, 0, 129, 0],
    "nothing": [0, 0],
    "no-sequence": [],
}

# (log_scale, bias): SigLIP's start, and a trained model's (So400m: temperature 117, bias -16.5).
TEMPERATURES = {"init": (2.3026, -10.0), "trained": (4.7622, -16.5)}


def make_inputs(B, M, D, dtype, device="cpu", temperature="init"):
    """Unit vectors of two towers; half of the captions resemble their images, as in training."""
    g = torch.Generator().manual_seed(0)
    img = F.normalize(torch.randn(B, D, generator=g), dim=-1)
    txt = torch.randn(M, D, generator=g)
    n = (min(B, M) + 1) // 2
    txt[:n] = img[:n] + 0.3 * txt[:n] / D**0.5
    scalars = [torch.tensor(value) for value in TEMPERATURES[temperature]]
    inputs = [img.to(dtype), F.normalize(txt, dim=-1).to(dtype), *scalars]
    return [x.to(device).requires_grad_() for x in inputs]


def make_features(B, M, D, dtype, device="cpu", temperature="init"):
    """Rows of towers before normalisation: of any length, the last image's and caption's 0."""
    img, txt, *scalars = make_inputs(B, M, D, torch.float32, "cpu", temperature)
    g = torch.Generator().manual_seed(2)
    rows = [x.detach() * 30 * torch.rand(len(x), 1, generator=g) for x in (img, txt)]
    for x in rows:
        x[-1] = 0
    return [*(x.to(device, dtype).requires_grad_() for x in rows), *(x.to(device) for x in scalars)]


def make_pairs(kind, B, M, device="cpu"):
    """Several positives to an image, images without any, and weights far from 1.

    "ignored" needs B == M; its ignore ids are equal on the diagonal too, which still counts.
    """
    g = torch.Generator().manual_seed(1)
    if kind == "diagonal":
        return {}
    # Beyond int32: ids may be hashes.
    ignore = {"img_ignore_ids": torch.arange(B) // 3, "txt_ignore_ids": torch.arange(M) // 3}
    if kind == "ignored":
        return {name: (x + 2**40).to(device) for name, x in ignore.items()}
    ids = {"img_ids": torch.randperm(B, generator=g) // 2, "txt_ids": torch.arange(M) % (B + 1)}
    if kind == "ids":
        return {name: (x + 2**40).to(device) for name, x in ids.items()}
    weights = {
        "img_weight": torch.rand(B, generator=g) / 30_000,
        "txt_weight": torch.rand(M, generator=g) * 7,
    }
    ids = {name: x.int() for name, x in (ids | ignore).items()}
    return {name: x.to(device) for name, x in (ids | weights).items()}
