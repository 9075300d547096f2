import subprocess
import sys
from pathlib import Path

import pytest
import torch

import siglip2_kernels
from siglip2_kernels._core.backend import choose, explain, has_triton, no_triton
from siglip2_kernels._core.chunks import row_chunks
from siglip2_kernels._core.matmul import addmm_f32_, mm_f32
from siglip2_kernels._core.varlen import cu_seqlens_from_lengths, tile_map
from siglip2_kernels.report import report
from strategies import LENGTHS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALL = {"cuda": "not built", "triton": None, "chunked": None, "reference": None}


def test_choose_takes_the_first_that_can_and_chunked_on_the_cpu():
    assert choose(None, ALL, CUDA) == "triton"
    assert choose(None, ALL | {"triton": "odd"}, CUDA) == "chunked"
    assert choose(None, ALL, CPU) == "chunked"
    assert choose(None, {"triton": None, "reference": None}, CPU) == "reference"


def test_choose_never_falls_back_from_a_name():
    assert choose("reference", ALL, CUDA) == "reference"
    with pytest.raises(NotImplementedError, match="backend 'cuda': not built"):
        choose("cuda", ALL, CUDA)


def test_choose_rejects_unknown_names():
    with pytest.raises(
        ValueError, match="one of 'cuda', 'triton', 'chunked', 'reference'; got 'x'"
    ):
        choose("x", ALL, CUDA)


def test_choose_lists_every_reason_when_nothing_runs():
    with pytest.raises(NotImplementedError, match="triton: odd; cuda: not built"):
        choose(None, {"triton": "odd", "cuda": "not built"}, CUDA)


def test_explain_says_why_faster_backends_were_passed_over():
    choice = explain("op", ALL, CPU)
    assert str(choice) == "op: chunked (cuda: not built; triton: not the default on cpu)"
    assert str(explain("op", {"triton": None}, CUDA)) == "op: triton"


def test_report_names_each_op_and_its_cpu_backend():
    found = {choice.op: choice.backend for choice in report("cpu")}
    folders = Path(siglip2_kernels.__file__).parent.glob("*/op.py")
    expected = dict.fromkeys((op.parent.name for op in folders), "chunked")
    assert found == expected | {"fused_adamw": "torch"}


def test_no_triton_without_a_gpu_or_the_interpreter():
    # Under the interpreter CPU tensors run, apart from bfloat16; the interpreter tier shows it.
    x = torch.zeros(2, dtype=torch.bfloat16)
    assert has_triton()
    assert "interpreter multiplies bfloat16" in no_triton(x) or "CUDA tensor, got cpu" in no_triton(
        x
    )


ABSENT = """
import importlib.machinery, sys
real = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = staticmethod(
    lambda name, *a: None if name.split(".")[0] == "triton" else real(name, *a))
import torch, siglip2_kernels
x = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
args = x, x, torch.tensor(2.0), torch.tensor(-10.0)
assert siglip2_kernels.sigmoid_loss(*args) > 0
try:
    siglip2_kernels.sigmoid_loss(*args, backend="triton")
except NotImplementedError as error:
    print(error)
"""


def test_works_where_triton_is_absent():
    done = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True)
    assert (
        done.stdout.strip() == "backend 'triton': needs the package 'triton' (pip install triton)"
    )


def test_importing_the_package_does_not_import_triton_kernels():
    # torch itself may import triton; our kernel modules must wait for the first use.
    code = "import sys, siglip2_kernels; print([m for m in sys.modules if m.endswith('_triton')"
    code += " and m.startswith('siglip2_kernels') or m == 'siglip2_kernels._core.triton_math'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("rows", "columns", "most", "multiple"), [(10, 7, 21, 1), (300, 5, 100, 128)]
)
def test_row_chunks_cover_each_row_once_within_the_bound(rows, columns, most, multiple):
    chunks = list(row_chunks(rows, columns, most, multiple))
    assert [i for start, stop in chunks for i in range(start, stop)] == list(range(rows))
    assert len(chunks) > 1
    assert all((stop - start) % multiple == 0 for start, stop in chunks[:-1])
    assert all(stop - start <= max(most // columns, multiple) for start, stop in chunks)


def test_row_chunks_of_an_empty_matrix():
    assert list(row_chunks(0, 5, 10)) == []
    assert list(row_chunks(3, 0, 10)) == [(0, 3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def test_products_keep_float32_sums(dtype, device):
    # 1 + 2^-12 is lost when the sum is rounded to half precision.
    a = torch.tensor([[1.0, 2.0**-12]], dtype=dtype, device=device)
    b = torch.ones(2, 1, dtype=dtype, device=device)
    acc = torch.full((1, 1), 2.0**-13, dtype=mm_f32(a, b).dtype, device=device)
    addmm_f32_(acc, a, b)
    out = torch.empty_like(acc)
    assert float(mm_f32(a, b, out=out)) == float(out) == 1 + 2.0**-12
    assert float(acc) == 1 + 2.0**-12 + 2.0**-13


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("block", [16, 64])
def test_tile_map_covers_every_token_once(lengths, block):
    cu = cu_seqlens_from_lengths(lengths)
    tiles = tile_map(cu, block)
    assert cu.dtype == tiles.dtype == torch.int32
    tokens = [
        int(cu[i]) + row
        for i, tile in tiles.tolist()
        for row in range(tile * block, min((tile + 1) * block, lengths[i]))
    ]
    assert tokens == list(range(sum(lengths)))
    assert all(tile * block < lengths[i] for i, tile in tiles.tolist())


def test_lengths_may_be_a_host_tensor():
    assert cu_seqlens_from_lengths(torch.tensor([2, 0, 3])).tolist() == [0, 2, 2, 5]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, -1], "lengths >= 0; got -1"),
        ([2**30, 2**30], "at most 2147483647 tokens in a pack; got 2147483648"),
        ([1.5], "lengths of one dimension, int32 or int64; got .* torch.float32"),
        (torch.ones(2, 2, dtype=torch.int64), r"lengths of one dimension.*got \(2, 2\)"),
        (torch.ones(2, dtype=torch.int32, device="meta"), "lengths on the host; got .* meta"),
    ],
)
def test_rejects_bad_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        cu_seqlens_from_lengths(lengths)


@pytest.mark.parametrize("cu", [[], [1, 2], [0, 5, 3]])
def test_rejects_offsets_that_do_not_rise_from_zero(cu):
    with pytest.raises(ValueError, match="start at 0 and never fall"):
        tile_map(cu, 16)
