"""How long a device waits for others in the sigmoid loss: a model, from 8 to 2,048 devices.

`python -P -m siglip2_bench.exposed_communication [--png FILE.png]` prints it with its assumptions.

Three ways to bring each image together with all texts:

    bare    all-gather before the loss, reduce-scatter of the texts' gradients after it; nothing
            runs meanwhile (a loss module that gets both features at once can do no better)
    early   the same two, behind the image tower's forward and backward (`TrainStep`)
    ring    text blocks and their float32 gradient sums travel during the loss (`siglip2.ring`)
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from siglip2.errors import require
from siglip2.models.presets import TowerSize, architecture

from .machine import results_dir
from .report import markdown_table
from .result import read_results

DEVICES = tuple(8 << i for i in range(9))
BATCHES = (32_768, 131_072)  # images and texts over all devices
MODELS = {768: "siglip2-base-patch16-256", 1152: "siglip2-so400m-patch16-256"}  # D -> towers
TEXT_BYTES, GRADIENT_BYTES = 2, 4  # an element on the wire: bfloat16 there, float32 back
BACKWARD_FLOPS = 2  # of a tower, in units of its forward
METHODS = ("bare", "early", "ring")


@dataclass(frozen=True, kw_only=True)
class Network:
    """Bandwidths in one direction; latency is that of one message, software included."""

    node_size: int = 8
    nvlink_bytes_per_s: float = 450e9
    infiniband_bytes_per_s: float = 50e9  # of each device
    nvlink_latency_s: float = 5e-6
    infiniband_latency_s: float = 10e-6
    is_flat: bool = False  # each device receives every row by its own InfiniBand link

    def collective_s(self, total_bytes: float, num_devices: int) -> float:
        """An all-gather to, or reduce-scatter from, `total_bytes` on each device.

        In two stages: equal places of all nodes exchange over InfiniBand, then each node exchanges
        inside. The stages are added, not overlapped.
        """
        inside = min(num_devices, self.node_size)
        nodes = math.ceil(num_devices / self.node_size)
        if self.is_flat and nodes > 1:
            sent = total_bytes * (num_devices - 1) / num_devices
            rounds = num_devices - 1
            return sent / self.infiniband_bytes_per_s + rounds * self.infiniband_latency_s
        across = total_bytes / inside * (nodes - 1) / nodes / self.infiniband_bytes_per_s
        within = total_bytes * (inside - 1) / inside / self.nvlink_bytes_per_s
        latency = math.ceil(math.log2(nodes)) * self.infiniband_latency_s
        return across + within + latency + (inside - 1) * self.nvlink_latency_s

    def hop_s(self, num_bytes: float, num_devices: int) -> float:
        """To the next device of a ring; the slowest link sets the pace of all."""
        if num_devices <= self.node_size:
            return num_bytes / self.nvlink_bytes_per_s + self.nvlink_latency_s
        return num_bytes / self.infiniband_bytes_per_s + self.infiniband_latency_s


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Rates of one device; the notes say where they come from."""

    loss_flops_per_s: float = 600e12
    tower_flops_per_s: float = 400e12
    loss_note: str = "modelled, not measured"
    tower_note: str = "modelled, not measured"


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """Seconds of one step on one device."""

    batch: int
    D: int
    num_devices: int
    loss_s: float
    image_forward_s: float
    towers_s: float  # both, forward and backward
    all_gather_s: float
    reduce_scatter_s: float
    bare_s: float  # exposed, as the next two
    early_s: float
    ring_s: float

    def share(self, method: str) -> float:
        """Of the step, which lasts as long as its computation and what is exposed."""
        exposed = getattr(self, f"{method}_s")
        return exposed / (self.loss_s + self.towers_s + exposed)


def tower_flops(size: TowerSize, num_tokens: int) -> float:
    """Forward of one sequence: projections, MLP and attention of each layer."""
    weights = 4 * size.width**2 + 2 * size.width * size.mlp_width
    attention = 2 * num_tokens * size.width
    return 2.0 * size.depth * num_tokens * (weights + attention)


def exposure(
    batch: int, D: int, num_devices: int, *, network: Network, compute: Compute
) -> Exposure:
    """The model at one point. Each device has `batch / num_devices` pairs and all texts."""
    arch = architecture(MODELS[D])
    num_pairs = batch / num_devices
    per_pair = num_pairs / compute.tower_flops_per_s
    image_s = per_pair * tower_flops(arch.vision.size, arch.vision.grid_size**2)
    text_s = per_pair * tower_flops(arch.text.size, arch.text.length)
    loss_s = 6 * num_pairs * batch * D / compute.loss_flops_per_s
    gather_s = network.collective_s(batch * D * TEXT_BYTES, num_devices)
    scatter_s = network.collective_s(batch * D * GRADIENT_BYTES, num_devices)
    late_s = max(0.0, gather_s - image_s) + max(0.0, scatter_s - BACKWARD_FLOPS * image_s)
    return Exposure(
        batch=batch,
        D=D,
        num_devices=num_devices,
        loss_s=loss_s,
        image_forward_s=image_s,
        towers_s=(1 + BACKWARD_FLOPS) * (image_s + text_s),
        all_gather_s=gather_s,
        reduce_scatter_s=scatter_s,
        bare_s=gather_s + scatter_s,
        early_s=late_s,
        ring_s=ring_exposed_s(num_pairs * D, num_devices, loss_s / num_devices, network),
    )


def ring_exposed_s(block: float, num_devices: int, block_s: float, network: Network) -> float:
    """What a ring's messages take beyond the blocks they hide behind.

    Args:
        block: Elements of one device's texts.
        block_s: One device's images against one block, with gradients.
    """
    if num_devices == 1:
        return 0.0
    text, total = block * TEXT_BYTES, block * GRADIENT_BYTES
    # Behind the first block there is no sum yet, behind the last no text; the sum of the last
    # block goes home with nothing left to hide it.
    hidden = [text, *[text + total] * (num_devices - 2), total]
    waits = [max(0.0, network.hop_s(n, num_devices) - block_s) for n in hidden]
    return math.fsum(waits) + network.hop_s(total, num_devices)


def measured_loss(results: Path, compute: Compute, D: int) -> Compute:
    """`compute` at the rate of the largest bfloat16 loss of this width in `results`, if any."""
    rows = [
        (row.shape["B"], row, result.machine)
        for result in read_results(results)
        if result.op == "sigmoid_loss" and result.machine.device == "cuda"
        for row in result.rows
        if (row.provider, row.mode, row.dtype, row.status) == ("siglip2", "full", "bf16", "ok")
        and row.shape["D"] == D
    ]
    if not rows:
        return compute
    size, row, machine = max(rows, key=lambda found: found[0])
    note = f"measured at {size:,} pairs on {machine.name}, commit {row.commit or 'not recorded'}"
    return replace(compute, loss_flops_per_s=row.tflops * 1e12, loss_note=note)


def assumptions(network: Network, computes: dict[int, Compute]) -> list[str]:
    stages = (
        "one flat ring: every device receives every row over its own InfiniBand link"
        if network.is_flat
        else "two stages, added: over InfiniBand, where each device brings in 1/"
        f"{network.node_size} of what other nodes hold, then over NVLink"
    )
    lines = [
        f"NVLink {network.nvlink_bytes_per_s / 1e9:g} GB/s in a node of {network.node_size},"
        f" InfiniBand {network.infiniband_bytes_per_s / 1e9:g} GB/s a device across nodes;"
        f" {network.nvlink_latency_s * 1e6:g} and {network.infiniband_latency_s * 1e6:g} us a"
        " message. Nothing else uses the links.",
        f"Collectives run in {stages}.",
        "Texts travel in bfloat16, their gradients in float32. The exchange of row counts (16 bytes"
        " a rank) is not counted.",
        "Computation is not slowed by transfers, nor by small shapes; each device holds the same"
        " number of pairs.",
    ]
    for D, compute in computes.items():
        lines.append(
            f"D={D}: loss at {compute.loss_flops_per_s / 1e12:.0f} TFLOP/s ({compute.loss_note});"
            f" towers of {MODELS[D]} at {compute.tower_flops_per_s / 1e12:.0f} TFLOP/s"
            f" ({compute.tower_note}), backward {BACKWARD_FLOPS} forwards."
        )
    return lines


def table(points: Sequence[Exposure]) -> list[str]:
    header = ["batch", "D", "devices", "pairs each", "loss ms", "image tower ms", "all-gather ms"]
    header += ["reduce-scatter ms", *(f"{method}: exposed ms (of step)" for method in METHODS)]
    lines = []
    for p in points:
        times = (p.loss_s, p.image_forward_s, p.all_gather_s, p.reduce_scatter_s)
        sizes = [str(n) for n in (p.batch, p.D, p.num_devices, p.batch // p.num_devices)]
        exposed = [
            f"{1e3 * getattr(p, f'{method}_s'):.3f} ({p.share(method):.1%})" for method in METHODS
        ]
        lines.append([*sizes, *(f"{1e3 * s:.3f}" for s in times), *exposed])
    return markdown_table(header, lines)


def save_plot(path: Path, points: Sequence[Exposure]) -> None:
    """Exposed milliseconds against devices, a panel for each batch and width."""
    require("matplotlib", "bench")
    from matplotlib.figure import Figure

    panels = {key: [p for p in points if (p.batch, p.D) == key] for key in _keys(points)}
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, ((batch, D), members) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        devices = [p.num_devices for p in members]
        for method in METHODS:
            exposed_ms = [1e3 * getattr(p, f"{method}_s") for p in members]
            axes.plot(devices, exposed_ms, marker="o", markersize=3, label=method)
        axes.plot(devices, [1e3 * p.loss_s for p in members], "k:", label="loss (computation)")
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=0.1)  # zero is a value here
        axes.set_ylim(bottom=-0.01)
        axes.set(title=f"global batch {batch:,}, D={D}", xlabel="devices", ylabel="exposed ms")
        axes.grid(True, alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _keys(points: Sequence[Exposure]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((p.batch, p.D) for p in points))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -P -m siglip2_bench.exposed_communication",
        description=__doc__.partition("\n")[0],
    )
    parser.add_argument("--png", type=Path, help="also draw it")
    parser.add_argument("--flat", action="store_true", help="collectives as one flat ring")
    parser.add_argument("--loss-tflops", type=float, help="instead of what bench/results holds")
    parser.add_argument("--tower-tflops", type=float, help="default: 400")
    parser.add_argument("--results", type=Path, default=results_dir(), help="default: %(default)s")
    args = parser.parse_args(argv)
    network, compute = Network(is_flat=args.flat), Compute()
    if args.tower_tflops:
        given = args.tower_tflops * 1e12
        compute = replace(compute, tower_flops_per_s=given, tower_note="as given")
    if args.loss_tflops:
        given = args.loss_tflops * 1e12
        computes = dict.fromkeys(
            MODELS, replace(compute, loss_flops_per_s=given, loss_note="as given")
        )
    else:
        computes = {D: measured_loss(args.results, compute, D) for D in MODELS}
    points = [
        exposure(batch, D, num_devices, network=network, compute=computes[D])
        for batch in BATCHES
        for D in MODELS
        for num_devices in DEVICES
    ]
    print("\n".join(f"- {line}" for line in assumptions(network, computes)), end="\n\n")
    print("\n".join(table(points)))
    if args.png:
        save_plot(args.png, points)
        print(f"\nwrote {args.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
