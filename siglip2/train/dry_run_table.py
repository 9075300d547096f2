"""`DryRun` as text."""

import math
from collections.abc import Iterable

from ..config import Config
from . import setup
from .dry_run import DryRun
from .step_record import CASTS, DECODER, LOSS, STAGE, TEXT, TOWERS, VISION, Collective

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_dry_run(run: DryRun) -> str:
    """Parameters, memory of a device, steps, collectives and FLOPs, one table below the other."""
    blocks = (_heading(run), _parameters(run), _memory(run), _steps(run), _collectives(run))
    return "\n\n".join((*blocks, _flops(run)))


def _heading(run: DryRun) -> str:
    config, vision = run.config, run.architecture.vision
    share = f"{run.world_size:,} x {config.train.batch_size:,}"
    if run.world_size > 1:
        share += f" ({config.dist.strategy}, {config.dist.loss})"
    side = vision.image_size
    size = f"{side} x {side} pixels"
    if vision.is_naflex:
        budgets, most = config.data.patch_budgets, config.data.max_num_patches
        N, name = (max(budgets), "patch_budgets") if budgets else (most, "max_num_patches")
        size = f"{N} patches each (data.{name}, the worst case)"
    text = run.architecture.text
    source = f", weights of {config.model.pretrained} not read" if config.model.pretrained else ""
    return (
        f"{config.model.name}{source}; {config.train.precision} activations\n"
        f"devices x images {share}; images of {size};"
        f" {config.data.captions_per_image} x {text.length} tokens an image,"
        f" vocabulary {text.vocab_size:,}"
    )


def _parameters(run: DryRun) -> str:
    whole = run.whole
    rows = [("parameters", "number")]
    rows += [(VISION, f"{whole.vision:,}"), (TEXT, f"{whole.text:,}")]
    rows += [("  of which token table", f"{whole.token_table:,}")]
    rows += [(DECODER, f"{whole.decoder:,}")] if whole.decoder else []
    rows += [(STAGE, f"{whole.stage:,}")] if whole.stage else []
    rows += [("scalars", f"{whole.scalars:,}"), ("total", f"{whole.total:,}")]
    rows += [("teacher, averaged", f"{whole.teacher:,}")] if whole.teacher else []
    return _table(rows)


def memory_bytes(run: DryRun) -> dict[str, int]:
    """What lies in the memory of one device at its fullest, by part."""
    config, step = run.config, run.step
    checkpointed = config.model.grad_checkpointing
    strategy = {"ddp": "gradient buckets (DDP)", "fsdp": "gathered weights, gradients (FSDP2)"}
    rows = {
        "weights": 4 * run.local.total,
        "teacher": 4 * run.local.teacher,
        "gradients": 4 * run.local.total,
        "AdamW": 8 * run.local.total,
        f"activations, {VISION}": step.saved_bytes[VISION],
        f"activations, {TEXT}": step.saved_bytes[TEXT],
        f"activations, {DECODER}": step.saved_bytes[DECODER],
        f"activations, {STAGE}": step.saved_bytes[STAGE],
        f"{config.train.precision} copies of weights": step.saved_bytes[CASTS],
        "one block, recomputed": step.recomputed_bytes if checkpointed else 0,
        f"losses ({config.dist.loss})": step.loss_bytes,
        strategy[config.dist.strategy]: run.strategy_bytes,
        "batch": run.batch_bytes,
    }
    return {name: size for name, size in rows.items() if size}


def _memory(run: DryRun) -> str:
    local = run.local
    parts = (
        (VISION, local.vision),
        (TEXT, local.text),
        ("  of which token table", local.token_table),
        *([(DECODER, local.decoder)] if local.decoder else []),
        *([(STAGE, local.stage)] if local.stage else []),
        ("scalars", local.scalars),
    )
    saved = run.step.saved_bytes
    rows = [("memory of a device", "weights", "gradients", "AdamW", "activations", "in all")]
    for name, n in parts:
        activations = saved.get(name, 0)
        kept = human(activations) if activations else ""
        rows.append((name, *map(human, (4 * n, 4 * n, 8 * n)), kept, human(16 * n + activations)))
    sizes = memory_bytes(run)
    for name in sizes:
        if not name.startswith(("weights", "gradients", "AdamW", "activations")):
            rows.append((name, "", "", "", "", human(sizes[name])))
    rows.append(("total", "", "", "", "", human(sum(sizes.values()))))
    notes = ["scratch memory of kernels and the allocator's gaps come on top"]
    if run.config.model.grad_checkpointing:
        notes.append("blocks keep their inputs (model.grad_checkpointing)")
    if run.whole.stage:
        notes.append(f"a step of the last stage, from {run.config.ssl.start_share:.0%} on")
    if run.config.train.accum_steps > 1:
        notes.append(f"activations are those of one of {run.config.train.accum_steps} parts")
    return _table(rows) + f"\n({'; '.join(notes)})"


def _steps(run: DryRun) -> str:
    config = run.config
    train, optim = config.train, config.optim
    global_batch = train.batch_size * run.world_size
    num_steps = math.ceil(train.examples / global_batch)
    rows = [("steps", "", "")]
    parts = f"{train.accum_steps} parts a device" if train.accum_steps > 1 else ""
    rows.append(("images a step", f"{global_batch:,}", parts))
    rows.append(("steps", f"{num_steps:,}", f"{num_steps * global_batch:,} images"))
    warm = math.ceil(optim.warmup_examples / global_batch)
    points = {"first": 0, "half-way": num_steps // 2, "last": num_steps - 1}
    if 0 < warm < num_steps:
        points["warm-up done"] = warm
    for name, step in sorted(points.items(), key=lambda point: point[1]):
        rate = _rate(config, step * global_batch)
        rows.append((f"learning rate, {name}", f"{rate:.3g}", f"step {step:,}"))
    if warm >= num_steps:
        rows.append(("", "", f"the warm-up of {warm:,} steps is longer than the run"))
    return _table(rows)


def _rate(config: Config, examples: int) -> float:
    return config.optim.lr * setup.build_schedule(config)(examples)


def _collectives(run: DryRun) -> str:
    if run.world_size == 1:
        return "one device: nothing is sent"
    rows = [("collectives a step", "kind", "number", "bytes each", "a device sends")]
    total = 0
    for (what, kind), group in _grouped(run.step.collectives).items():
        sent = sum(c.sent_bytes(run.world_size) for c in group)
        total += sent
        each = sorted({c.num_bytes for c in group})
        size = human(each[0]) if len(each) == 1 else f"{human(each[0])} to {human(each[-1])}"
        rows.append((what, kind, f"{len(group):,}", size, human(sent)))
    rows.append(("total", "", f"{len(run.step.collectives):,}", "", human(total)))
    return _table(rows) + "\n(sent: where ranks form a ring; log lines and checkpoints send more)"


def _grouped(collectives: Iterable[Collective]) -> dict[tuple[str, str], list[Collective]]:
    groups: dict[tuple[str, str], list[Collective]] = {}
    for c in collectives:
        groups.setdefault((c.what, c.kind), []).append(c)
    return groups


def _flops(run: DryRun) -> str:
    flops = run.step.flops
    rows = [("FLOPs of a device and step", "")]
    rows += [
        (part, f"{flops[part]:.4g}") for part in (TOWERS, DECODER, STAGE, LOSS) if flops.get(part)
    ]
    rows.append(("total", f"{sum(flops.values()):.4g}"))
    return (
        _table(rows) + "\n(matrix products and attention; a multiplication and an addition are 2)"
    )


def human(num_bytes: int) -> str:
    """Three digits and a binary unit."""
    size, unit = float(num_bytes), 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{num_bytes} B" if unit == 0 else f"{size:.{3 - len(str(int(size)))}f} {_UNITS[unit]}"


def _table(rows: list[tuple[str, ...]]) -> str:
    """Names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
