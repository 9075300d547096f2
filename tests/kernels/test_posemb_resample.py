import pytest
import torch
import torch.nn.functional as F

from compare import assert_no_worse
from siglip2_kernels import posemb_resample
from siglip2_kernels.posemb_resample import reference
from strategies import RUNNERS

GRIDS = {
    "one": [(1, 1)],
    "the-table's-own": [(5, 5), (5, 5)],
    "mixed": [(6, 9), (7, 8), (9, 6), (5, 5), (7, 8)],
    "columns-and-rows": [(1, 40), (40, 1), (2, 30)],
    "larger": [(12, 12), (7, 20)],
    "empty-images": [(0, 5), (4, 4), (3, 0), (2, 9), (0, 0)],
    "none": [],
}
OWN = [runner for runner in RUNNERS if runner.values[0] in ("chunked", "triton")]
WIDTHS = {"pow2": 64, "so400m-like": 72}


def make_table(D, G=16, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    return torch.randn(G, G, D, generator=g).to(device, dtype).requires_grad_()


def value_and_grad(fn, table):
    out = fn(table)
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=g).to(out.device, out.dtype)
    return out.detach(), torch.autograd.grad(out, table, dout)[0]


@pytest.mark.parametrize("D", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize(("backend", "device"), OWN)
def test_matches_reference(backend, device, grids, D):
    check(make_table(D, G=5, device=device), grids, backend)


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_matches_reference_at_the_released_size(backend, device):
    check(make_table(24, device=device), [(13, 19), (1, 40)], backend)


def check(table, grids, backend):
    spec = lambda t: reference.posemb_resample(t, grids)
    gold = value_and_grad(spec, table.detach().double().requires_grad_())
    eager = value_and_grad(spec, table)
    actual = value_and_grad(lambda t: posemb_resample(t, grids, backend=backend), table)
    for name, a, e, g in zip(("out", "dtable"), actual, eager, gold, strict=True):
        assert_no_worse(name, a, e, g, torch.float32)


TRITON = [runner for runner in OWN if runner.values[0] == "triton"]


@pytest.mark.parametrize("grid", [(5, 5), (1, 7), (9, 4)])
@pytest.mark.parametrize(("backend", "device"), TRITON)
def test_images_of_one_grid_are_summed_first(backend, device, grid, monkeypatch):
    from siglip2_kernels.posemb_resample import _triton

    grids, general, seen = [grid] * 3, _triton._bwd, []
    monkeypatch.setattr(_triton, "_bwd", lambda d, *a: seen.append(len(d)) or general(d, *a))
    table = make_table(40, G=3, device=device)
    check(table, grids, backend)
    assert seen == [grid[0] * grid[1]]
    monkeypatch.setattr(_triton, "_is_one_grid", lambda grid_hw: False)
    check(table, grids, backend)
    assert seen[1:] == [3 * grid[0] * grid[1]]


@pytest.mark.gpu
def test_grids_on_the_device_take_the_general_path():
    table, grids = make_table(24, G=4, device="cuda"), [(3, 4)] * 5
    on_device = torch.tensor(grids, dtype=torch.int32, device="cuda")
    spec = lambda t: reference.posemb_resample(t, grids)
    gold = value_and_grad(spec, table.detach().double().requires_grad_())
    eager = value_and_grad(spec, table)
    fn = lambda t: posemb_resample(t, on_device, num_tokens=60, backend="triton")
    for name, a, e, g in zip(
        ("out", "dtable"), value_and_grad(fn, table), eager, gold, strict=True
    ):
        assert_no_worse(name, a, e, g, torch.float32)


@pytest.mark.parametrize("h", [1, 2, 3, 13, 16, 31, 64, 1024])
def test_reference_is_torch_interpolate(h):
    table = make_table(8).detach().double()
    for w in (2, 5, 19, 16, 1024 // h):
        if w < 2:  # torch's CPU kernel errs there: see the next test
            continue
        planes = table.permute(2, 0, 1)[None]
        expected = F.interpolate(planes, (h, w), mode="bilinear", antialias=True)
        found = reference.posemb_resample(table, [(h, w)])
        torch.testing.assert_close(found, expected[0].flatten(1).T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("h", [1, 2, 16, 100, 1024])
def test_a_width_of_one_is_the_transposed_height_of_one(h):
    table = make_table(8).detach().double()
    across = reference.posemb_resample(table.transpose(0, 1), [(1, h)])
    torch.testing.assert_close(reference.posemb_resample(table, [(h, 1)]), across)


def test_every_shape_of_256_patches_equals_interpolate_by_default():
    table = make_table(8).detach()
    grids = [(1 << k, 256 >> k) for k in range(8)]
    rows = posemb_resample(table, grids).split([h * w for h, w in grids])
    for (h, w), row in zip(grids, rows, strict=True):
        planes = table.permute(2, 0, 1)[None]
        expected = F.interpolate(planes, (h, w), mode="bilinear", antialias=True)
        torch.testing.assert_close(row, expected[0].flatten(1).T, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_result_dtype_is_one_rounding(backend, device):
    table = make_table(24, G=4, device=device)
    grids = GRIDS["mixed"]
    whole = posemb_resample(table, grids, backend=backend)
    half = posemb_resample(table, grids, dtype=torch.float16, backend=backend)
    assert torch.equal(half, whole.half())
    assert torch.autograd.grad(half.float().sum(), table)[0].dtype is torch.float32


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_two_runs_are_bit_equal(backend, device):
    table = make_table(24, G=4, device=device)
    fn = lambda t: posemb_resample(t, [(3, 4), (1, 2), (2, 2)] * 6, backend=backend)
    first, second = value_and_grad(fn, table), value_and_grad(fn, table)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_each_image_alone_is_its_part_of_the_pack(backend, device):
    table = make_table(24, G=4, device=device).detach()
    grids = GRIDS["mixed"]
    alone = [posemb_resample(table, [grid], backend=backend) for grid in grids]
    assert torch.equal(posemb_resample(table, grids, backend=backend), torch.cat(alone))


def test_gradcheck():
    table = make_table(2, G=3, dtype=torch.float64)
    grids = [(2, 5), (1, 1), (4, 1)]
    fn = lambda t: posemb_resample(t, grids)
    assert torch.autograd.gradcheck(fn, table)


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_opcheck_and_fullgraph(backend, device):
    table = make_table(16, G=3, device=device)
    grid_hw = torch.tensor([(3, 4), (2, 2)], dtype=torch.int32)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    args = (table, grid_hw, 16, torch.float32, backend)
    torch.library.opcheck(torch.ops.siglip2.posemb_resample.default, args, test_utils=utils)
    fn = lambda t: posemb_resample(t, grid_hw, num_tokens=16, backend=backend)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_grad(compiled, table), value_and_grad(fn, table), strict=True):
        assert torch.equal(a, b)


def test_rejects_bad_input_by_name():
    table = make_table(4)
    with pytest.raises(ValueError, match=r"need a table \(G, G, D\) of floats; got \(16, 64\)"):
        posemb_resample(table.detach().flatten(1), [(1, 1)])
    with pytest.raises(ValueError, match=r"need grid_hw \(B, 2\) int32.*int64"):
        posemb_resample(table, torch.tensor([(1, 1)]))
    with pytest.raises(ValueError, match="need num_tokens 6, the sum of the grids; got 7"):
        posemb_resample(table, [(2, 3)], num_tokens=7)
    with pytest.raises(ValueError, match="need sides of 0 or more; got -1"):
        posemb_resample(table, [(2, -1)])
    with pytest.raises(NotImplementedError, match="backend 'cuda'"):
        posemb_resample(table, [(2, 1)], backend="cuda")
