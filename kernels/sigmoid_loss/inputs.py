"""What the sigmoid loss accepts, and what is said about its pairs."""

from typing import NamedTuple

import torch
from torch import Tensor

_INTEGERS = (torch.int32, torch.int64)


class Pairs(NamedTuple):
    """Which pairs are positives, which do not count, and what the others count.

    None: i <-> i are positives, all pairs count, and count 1.
    """

    img_ids: Tensor | None  # (B,) int32 or int64
    txt_ids: Tensor | None  # (M,) int32 or int64
    img_ignore_ids: Tensor | None  # (B,) int32 or int64
    txt_ignore_ids: Tensor | None  # (M,) int32 or int64
    img_weight: Tensor | None  # (B,)
    txt_weight: Tensor | None  # (M,)

    def with_unit_weights(self, img: Tensor) -> tuple["Pairs", Tensor]:  # ()
        """Weights over their maxima, and the maxima's product: G stays in float16's range.

        Ids and weights come out contiguous.
        """
        acc = torch.promote_types(img.dtype, torch.float32)
        factor = torch.ones((), dtype=acc, device=img.device)
        weights = []
        for weight in (self.img_weight, self.txt_weight):
            if weight is not None:
                weight = weight.to(acc)
                most = weight.abs().amax()
                factor = factor * most
                weight = torch.where(most > 0, weight / most, 0.0).contiguous()
            weights.append(weight)
        ids = (None if x is None else x.contiguous() for x in self[:4])
        return Pairs(*ids, *weights), factor


def check(img: Tensor, txt: Tensor, log_scale: Tensor, bias: Tensor, pairs: Pairs) -> None:
    """Raises ValueError."""
    if img.ndim != 2 or txt.ndim != 2 or img.shape[1] != txt.shape[1]:
        raise ValueError(f"need img (B, D), txt (M, D); got {tuple(img.shape)}, {tuple(txt.shape)}")
    if img.dtype != txt.dtype or not img.dtype.is_floating_point:
        got = f"{img.dtype}, {txt.dtype}"
        raise ValueError(f"need img and txt of one floating-point dtype; got {got}")
    for name, scalar in (("log_scale", log_scale), ("bias", bias)):
        if scalar.ndim != 0:
            raise ValueError(f"need {name} (); got {tuple(scalar.shape)}; pass {name}.squeeze()")
        if not scalar.dtype.is_floating_point:
            raise ValueError(f"need {name} of a floating-point dtype; got {scalar.dtype}")
    _check_ids(img, txt, pairs, "ids")
    _check_ids(img, txt, pairs, "ignore_ids")
    if pairs.img_ids is None and img.shape[0] != txt.shape[0]:
        raise ValueError(
            "need as many captions as images when ids are not given;"
            f" got B={img.shape[0]}, M={txt.shape[0]};"
            " pass img_ids and txt_ids: pairs whose ids are equal are positives"
        )
    _check_weight("img_weight", pairs.img_weight, img.shape[0])
    _check_weight("txt_weight", pairs.txt_weight, txt.shape[0])
    for name, x in zip(
        ("txt", "log_scale", "bias", *Pairs._fields), (txt, log_scale, bias, *pairs), strict=True
    ):
        if x is not None and x.device != img.device:
            raise ValueError(
                f"need all tensors on img's device, {img.device}; {name} is on {x.device}"
            )


def _check_ids(img: Tensor, txt: Tensor, pairs: Pairs, kind: str) -> None:
    names = f"img_{kind}", f"txt_{kind}"
    both = [getattr(pairs, name) for name in names]
    if (both[0] is None) != (both[1] is None):
        raise ValueError(f"need both {names[0]} and {names[1]}, or neither; got one")
    for name, ids, n in zip(names, both, (img.shape[0], txt.shape[0]), strict=True):
        if ids is not None and (ids.shape != (n,) or ids.dtype not in _INTEGERS):
            got = f"{tuple(ids.shape)} {ids.dtype}"
            raise ValueError(f"need {name} ({n},) of int32 or int64; got {got}")


def _check_weight(name: str, weight: Tensor | None, n: int) -> None:
    if weight is None:
        return
    if weight.shape != (n,) or not weight.dtype.is_floating_point:
        got = f"{tuple(weight.shape)} {weight.dtype}"
        raise ValueError(f"need {name} ({n},) of a floating-point dtype; got {got}")
    if weight.requires_grad:
        raise ValueError(f"{name} gets no gradient, but it requires one; pass {name}.detach()")
