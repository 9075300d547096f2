"""The model of exposed communication: cells computed by hand, limits, and where rates come from."""

import re
from dataclasses import replace
from itertools import pairwise, product

import pytest

from siglip2_bench import exposed_communication as model
from siglip2_bench.machine import Machine
from siglip2_bench.result import Result, Row, write_json
from siglip2_bench.timing import Quantiles

INSTANT = model.Network(nvlink_latency_s=0, infiniband_latency_s=0)
COMPUTE = model.Compute(loss_flops_per_s=800e12, tower_flops_per_s=400e12)


def at(batch, D, num_devices, network=INSTANT, compute=COMPUTE):
    return model.exposure(batch, D, num_devices, network=network, compute=compute)


def test_one_node_by_hand():
    # 32,768 x 768 bfloat16 = 50,331,648 bytes, of which 7/8 come from others at 450 GB/s.
    point = at(32_768, 768, 8)
    assert point.all_gather_s == pytest.approx(97.9e-6, rel=1e-3)
    assert point.reduce_scatter_s == pytest.approx(195.7e-6, rel=1e-3)
    assert point.bare_s == pytest.approx(293.6e-6, rel=1e-3)
    # 6 x 4,096 x 32,768 x 768 FLOPs at 800 TFLOP/s
    assert point.loss_s == pytest.approx(773.1e-6, rel=1e-3)
    # Seven hops hide: 4,096 x 768 x 6 bytes take 41.9 us, a block 96.6 us. The sum's way home,
    # 4 bytes an element, does not.
    assert point.ring_s == pytest.approx(4096 * 768 * 4 / 450e9)


def test_eight_nodes_by_hand():
    point = at(32_768, 768, 64)
    # 7/8 of 50,331,648 / 8 bytes over InfiniBand, then 7/8 of all of them over NVLink
    assert point.all_gather_s == pytest.approx(110.1e-6 + 97.9e-6, rel=1e-3)
    # A text hop, 62 of text and sum, one of the sum, each less a block of 1.51 us; a sum home.
    text = 512 * 768 * 2 / 50e9
    block = 6 * 512 * 512 * 768 / 800e12
    expected = (text - block) + 62 * (3 * text - block) + (2 * text - block) + 2 * text
    assert point.ring_s == pytest.approx(expected)


def test_messages_cost_their_latency():
    slow = model.Network(nvlink_latency_s=1.0, infiniband_latency_s=100.0)
    assert at(32_768, 768, 8, slow).all_gather_s == pytest.approx(7, rel=1e-3)
    assert at(32_768, 768, 64, slow).all_gather_s == pytest.approx(7 + 300, rel=1e-3)
    flat = replace(slow, is_flat=True)
    assert at(32_768, 768, 64, flat).all_gather_s == pytest.approx(6300, rel=1e-3)


def test_a_flat_ring_brings_each_row_over_infiniband():
    point = at(32_768, 768, 64, replace(INSTANT, is_flat=True))
    assert point.all_gather_s == pytest.approx(991e-6, rel=1e-3)
    assert at(32_768, 768, 8, replace(INSTANT, is_flat=True)) == at(32_768, 768, 8)


def test_tower_flops_of_a_base_image():
    # 12 layers x 256 tokens x (4 x 768^2 + 2 x 768 x 3072 + 2 x 256 x 768) multiply-adds
    size = model.architecture(model.MODELS[768]).vision.size
    assert model.tower_flops(size, 256) == 2 * 12 * 256 * (2_359_296 + 4_718_592 + 393_216)


@pytest.mark.parametrize("D", model.MODELS)
@pytest.mark.parametrize("batch", model.BATCHES)
def test_an_early_gather_exposes_only_what_outlasts_the_tower(batch, D):
    networks = (model.Network(), model.Network(is_flat=True))
    for num_devices, network in product(model.DEVICES, networks):
        point = at(batch, D, num_devices, network)
        hides = (
            point.image_forward_s >= point.all_gather_s
            and 2 * point.image_forward_s >= point.reduce_scatter_s
        )
        assert (point.early_s == 0) == hides
        assert 0 <= point.early_s <= point.bare_s
    fast = replace(COMPUTE, tower_flops_per_s=1e23)
    assert at(batch, D, 64, compute=fast).early_s == pytest.approx(
        at(batch, D, 64).bare_s, rel=1e-3
    )


def test_a_tower_too_short_leaves_the_rest_exposed():
    # 2,047 messages of 10 us outlast the 16 images of a device, forward 1.8 and backward 3.7 ms.
    point = at(32_768, 768, 2048, model.Network(is_flat=True))
    exposed = point.all_gather_s + point.reduce_scatter_s - 3 * point.image_forward_s
    assert point.early_s == pytest.approx(exposed)


@pytest.mark.parametrize("D", model.MODELS)
@pytest.mark.parametrize("batch", model.BATCHES)
def test_more_devices_expose_no_less(batch, D):
    points = [at(batch, D, n, model.Network()) for n in model.DEVICES]
    for fewer, more in pairwise(points):
        assert more.bare_s >= fewer.bare_s
        assert more.ring_s >= fewer.ring_s
        assert more.share("bare") > fewer.share("bare")
        assert more.loss_s == pytest.approx(fewer.loss_s / 2)


def test_slower_links_and_larger_batches_expose_no_less():
    slow = replace(INSTANT, infiniband_bytes_per_s=25e9)
    for method in model.METHODS:
        usual, slower, larger = (
            getattr(p, f"{method}_s")
            for p in (at(32_768, 768, 64), at(32_768, 768, 64, slow), at(131_072, 768, 64))
        )
        assert slower >= usual
        assert larger >= usual
    assert at(32_768, 768, 64, slow).bare_s > at(32_768, 768, 64).bare_s


def test_a_ring_of_one_sends_nothing():
    assert model.ring_exposed_s(512 * 768, 1, 1e-3, INSTANT) == 0


def write_result(folder, device="cuda"):
    def row(B, tflops, **fields):
        fields = {"provider": "siglip2", "dtype": "bf16", "D": 768, **fields}
        shape = {"B": B, "D": fields.pop("D")}
        times = Quantiles(1.0, 1.0, 1.0)
        return Row(
            op="sigmoid_loss", mode="full", shape=shape, status="ok", time_ms=times, tflops=tflops,
            commit="abc1234", **fields,
        )  # fmt: skip

    machine = Machine(
        device=device, name="NVIDIA H100", torch="2", triton="3", python="3", siglip2="0"
    )
    rows = [
        row(65_536, 555.0),
        row(4_096, 333.0),
        row(131_072, 999.0, provider="eager"),
        row(131_072, 44.0, dtype="fp32"),
        row(131_072, 666.0, D=1536),
    ]
    result = Result(
        op="sigmoid_loss",
        x_name="B",
        x_label="pairs",
        baseline="eager",
        machine=machine,
        rows=rows,
    )
    write_json(folder / machine.slug / "sigmoid_loss.json", result)


def test_a_measured_loss_takes_the_place_of_the_modelled(tmp_path):
    write_result(tmp_path)
    found = model.measured_loss(tmp_path, COMPUTE, 768)
    assert found.loss_flops_per_s == 555e12
    assert found.loss_note == "measured at 65,536 pairs on NVIDIA H100, commit abc1234"
    assert model.measured_loss(tmp_path, COMPUTE, 1152) == COMPUTE


def test_times_on_a_cpu_are_no_measurements(tmp_path):
    write_result(tmp_path, device="cpu")
    assert model.measured_loss(tmp_path, COMPUTE, 768) == COMPUTE


def test_the_script_prints_assumptions_and_every_cell(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    png = tmp_path / "exposed.png"
    assert model.main(["--png", str(png), "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "InfiniBand 50 GB/s a device across nodes" in out
    assert "loss at 600 TFLOP/s (modelled, not measured)" in out
    cells = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|", out, flags=re.MULTILINE)
    assert {tuple(map(int, c)) for c in cells} == {
        (batch, D, n) for batch in model.BATCHES for D in model.MODELS for n in model.DEVICES
    }
    assert png.read_bytes().startswith(b"\x89PNG")


def test_rates_can_be_given(tmp_path, capsys):
    argv = ["--loss-tflops", "123", "--tower-tflops", "45", "--flat", "--results", str(tmp_path)]
    assert model.main(argv) == 0
    out = capsys.readouterr().out
    assert "loss at 123 TFLOP/s (as given)" in out
    assert "at 45 TFLOP/s (as given)" in out
    assert "one flat ring" in out
