import pytest
import torch

from compare import assert_no_worse
from siglip2_kernels._core.backend import INTERPRET
from siglip2_kernels._core.unit_rows import EPS, unit_dtype, unit_rows, unit_rows_grad
from siglip2_kernels.sigmoid_loss import op  # noqa: F401  registers siglip2::unit_rows

RUNNERS = [
    pytest.param("eager", "cpu", id="eager-cpu"),
    pytest.param("triton", "cpu", id="triton-cpu", marks=pytest.mark.interpreter),
    pytest.param("eager", "cuda", id="eager-cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One element, widths around a power of two, So400m's.
WIDTHS = [1, 63, 64, 65, 1152]


def make_rows(D, dtype, device):
    """Rows of lengths 1e-3 to 1e3, the last of them 0, and a gradient."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.logspace(-3, 3, 7)[:, None]
    x = lengths * torch.nn.functional.normalize(torch.randn(7, D, generator=g), dim=-1)
    x[-1] = 0
    return x.to(device, dtype), torch.randn(7, D, generator=g).to(device)


def specification(x, d, scale, dtype):
    x = x.detach().to(dtype).requires_grad_()
    u = x / (x.norm(dim=-1, keepdim=True) + EPS)
    return u.detach(), torch.autograd.grad(u, x, d.to(dtype) * scale.to(dtype))[0]


# float16 has no room for the gradient of the row of zeros.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_rows_and_their_gradients_match_autograd(backend, device, dtype, D):
    x, d = make_rows(D, dtype, device)
    scale = torch.tensor(0.3, device=device)
    gold_u, gold_dx = specification(x, d, scale, torch.float64)
    eager_u, eager_dx = specification(x, d, scale, torch.float32)
    u = unit_rows(x, backend)
    assert u.dtype == unit_dtype(dtype)
    assert_no_worse("u", u, eager_u.to(u.dtype), gold_u, u.dtype)
    dx = unit_rows_grad(d, x, scale, torch.float32, backend)
    for i in range(len(x)):  # a short row's gradient is large: each row by itself
        # At D = 1 what remains is EPS / ||x|| of two terms that cancel.
        terms = float((d[i].abs().max() * scale / (x[i].float().norm() + EPS)).cpu())
        args = dx[i], eager_dx[i], gold_dx[i], torch.float32
        assert_no_worse(f"dx[{i}]", *args, terms=terms)
    if dtype is torch.bfloat16 and backend == "triton" and INTERPRET:
        return  # the interpreter cuts bits off where it should round
    rounded = unit_rows_grad(d, x, scale, dtype, backend)
    assert torch.equal(rounded, dx.to(dtype))


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_rows_and_columns_may_be_strided(backend, device):
    x, d = make_rows(16, torch.float32, device)
    scale = torch.tensor(1.0, device=device)
    few = 8 * torch.finfo(torch.float32).eps  # another order of the same sums
    for view in (x.T.contiguous().T, torch.cat((x, x), 1)[:, :16]):
        torch.testing.assert_close(
            unit_rows(view, backend), unit_rows(x, backend), rtol=few, atol=0
        )
        a, b = (unit_rows_grad(d, y, scale, torch.float32, backend) for y in (view, x))
        assert ((a - b).norm(dim=-1) <= few * b.norm(dim=-1)).all()


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_no_rows_are_no_error(backend, device, shape):
    x = torch.zeros(shape, device=device)
    assert unit_rows(x, backend).shape == shape
    scale = torch.tensor(1.0, device=device)
    assert unit_rows_grad(x, x, scale, torch.float16, backend).shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_tiny_and_huge_rows_are_finite(dtype):
    x = torch.tensor([[1e-30, 2e-30], [0.0, 1e-12], [3e4, -4e4]], dtype=torch.float64).to(dtype)
    d = torch.ones(3, 2, dtype=torch.promote_types(dtype, torch.float32))
    assert unit_rows(x).isfinite().all()
    dx = unit_rows_grad(d, x, torch.ones((), dtype=d.dtype), d.dtype)
    assert dx.isfinite().all()


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_opcheck(backend, device):
    x, d = make_rows(16, torch.float16, device)
    utils = ("test_schema", "test_faketensor")
    ops = torch.ops.siglip2
    torch.library.opcheck(ops.unit_rows.default, (x, backend), test_utils=utils)
    args = d, x, torch.tensor(2.0, device=device), torch.bfloat16, backend
    torch.library.opcheck(ops.unit_rows_grad.default, args, test_utils=utils)


@pytest.mark.aot
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("D", [768, 1152, 72])
def test_kernels_build_without_spills(D, capability):
    pytest.importorskip("triton")
    from siglip2_kernels._core import unit_rows_triton as kernels
    from siglip2_kernels._core.compile_report import compile_report

    tile = kernels.config(D)
    constants = {"D": D, "BD": tile["BD"], "EPS": EPS, "stride_xd": 1}
    launches = {
        kernels._unit_rows_kernel: {"x_ptr": "*bf16", "u_ptr": "*fp16"},
        kernels._unit_rows_grad_kernel: {
            "d_ptr": "*fp32",
            "x_ptr": "*bf16",
            "scale_ptr": "*fp32",
            "dx_ptr": "*bf16",
        },
    }
    for kernel, pointers in launches.items():
        built = compile_report(
            kernel,
            pointers | {"stride_x": "i32"},
            constants,
            capability=capability,
            num_warps=tile["num_warps"],
            num_stages=1,
            aligned=[*pointers, "stride_x"],
        )
        assert built.spill_bytes == 0
