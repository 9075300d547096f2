"""How tensors are called and laid out in a format: a table of rules, each a bijection."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
Convert = Callable[[Sequence[Tensor]], list[Tensor]]

AFFINE = ("weight", "bias")
NORM = {"weight": "scale", "bias": "bias"}  # flax's names


class Rule(NamedTuple):
    """Some tensors of ours and the tensors of theirs that hold the same numbers."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_theirs: Convert
    to_ours: Convert


def rename(ours: str, theirs: str) -> Rule:
    return Rule((ours,), (theirs,), list, list)


def affine(ours: str, theirs: str) -> list[Rule]:
    return [rename(f"{ours}.{name}", f"{theirs}.{name}") for name in AFFINE]


def reshape(ours: str, theirs: str, our_shape: Sequence[int], their_shape: Sequence[int]) -> Rule:
    return Rule(
        (ours,),
        (theirs,),
        lambda tensors: [tensors[0].reshape(their_shape)],
        lambda tensors: [tensors[0].reshape(our_shape)],
    )


def conv_patch_embed(ours: str, theirs: str, patch_size: int) -> Rule:
    """A linear layer over (y, x, channel) and the convolution that computes the same."""
    P = patch_size
    return Rule(
        (ours,),
        (theirs,),
        lambda tensors: [tensors[0].reshape(-1, P, P, 3).permute(0, 3, 1, 2)],
        lambda tensors: [tensors[0].permute(0, 2, 3, 1).flatten(1)],
    )


def regroup(
    ours: Sequence[str],
    theirs: Sequence[str],
    our_parts: Sequence[int],  # square blocks in each tensor of ours, along dimension 0
    their_parts: Sequence[int],
) -> Rule:
    """The same projections (query, key, value, ...) under other cuts: q|k|v, qkv, q|kv."""
    return Rule(
        tuple(ours),
        tuple(theirs),
        lambda tensors: _cut(torch.cat(list(tensors)), their_parts),
        lambda tensors: _cut(torch.cat(list(tensors)), our_parts),
    )


def _cut(x: Tensor, parts: Sequence[int]) -> list[Tensor]:
    unit = x.shape[0] // sum(parts)
    return list(x.split([unit * n for n in parts]))


def each(
    rule: Rule, outward: Callable[[Tensor], Tensor], inward: Callable[[Tensor], Tensor]
) -> Rule:
    """`rule` with every tensor of theirs laid out anew."""
    return rule._replace(
        to_theirs=lambda tensors: [outward(x) for x in rule.to_theirs(tensors)],
        to_ours=lambda tensors: rule.to_ours([inward(x) for x in tensors]),
    )


def stack(layers: Sequence[Rule], theirs: Sequence[str]) -> Rule:
    """The same rule of every layer as one, with a leading depth axis in their tensors."""
    width = len(layers[0].ours)

    def to_theirs(tensors: Sequence[Tensor]) -> list[Tensor]:
        groups = [tensors[i * width : (i + 1) * width] for i in range(len(layers))]
        outs = [rule.to_theirs(group) for rule, group in zip(layers, groups, strict=True)]
        return [torch.stack(column) for column in zip(*outs, strict=True)]

    def to_ours(tensors: Sequence[Tensor]) -> list[Tensor]:
        rows = zip(*(x.unbind(0) for x in tensors), strict=True)
        return [x for rule, row in zip(layers, rows, strict=True) for x in rule.to_ours(row)]

    return Rule(
        tuple(name for rule in layers for name in rule.ours), tuple(theirs), to_theirs, to_ours
    )


def export_state(rules: Iterable[Rule], state: State) -> State:
    """Our tensors under their names; works on meta tensors too, which tells the expected shapes."""
    out: State = {}
    for rule in rules:
        tensors = rule.to_theirs([state[name].detach() for name in rule.ours])
        out.update(zip(rule.theirs, tensors, strict=True))
    return out


def import_state(rules: Iterable[Rule], tensors: State) -> State:  # float32
    """Their tensors under our names. `match.check` has seen to it that every one is there."""
    out: State = {}
    for rule in rules:
        ours = rule.to_ours([tensors[name] for name in rule.theirs])
        for name, x in zip(rule.ours, ours, strict=True):
            out[name] = x.to(torch.float32, copy=True).contiguous()
    return out
