import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compare import assert_no_worse
from siglip2_kernels import patch_embed
from siglip2_kernels.patch_embed import _chunked, reference
from strategies import RUNNERS

OWN = [runner for runner in RUNNERS if runner.values[0] in ("chunked", "triton")]
# (T, K, D): K = P*P*C
SHAPES = {
    "one-token": (1, 48, 32),
    "ragged": (131, 192, 72),
    "no-multiple-of-any-tile": (65, 75, 40),
    "nothing": (0, 48, 32),
}
KINDS = ("plain", "position", "masked")
NAMES = ("out", "dweight", "dbias", "dposemb", "dmask_token", "dpatches")


def make_inputs(T, K, D, kind, patch_dtype, device="cpu"):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(device)
    if patch_dtype is torch.uint8:
        patches = torch.randint(0, 256, (T, K), generator=g, dtype=torch.uint8).to(device)
    else:
        patches = (torch.rand(T, K, generator=g) * 2 - 1).to(device, patch_dtype).requires_grad_()
    inputs = {"weight": draw(D, K) / K**0.5, "bias": draw(D)}
    if kind != "plain":
        inputs["posemb"] = draw(T, D)
    if kind == "masked":
        inputs["mask_token"] = draw(D)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    mask = (torch.rand(T, generator=g) < 0.5).to(device) if kind == "masked" else None
    return patches, inputs, mask


def evaluate(fn, patches, inputs, mask, dtype, gold=False):
    """Output and gradients; `gold` computes in float64 from the same values."""
    if gold:
        inputs = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
        if patches.is_floating_point():
            patches = patches.detach().double().requires_grad_()
        dtype = torch.float64
    out = fn(patches, **inputs, mask=mask, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=g).to(out.device).half().to(out.dtype)
    learned = [*inputs.values(), *([patches] if patches.requires_grad else [])]
    return [out.detach(), *torch.autograd.grad(out, learned, dout)]


def own_and_dtypes():
    found = []
    for runner in OWN:
        backend, device = runner.values
        dtypes = [torch.float32, torch.float16]
        if not (backend == "triton" and device == "cpu"):  # the interpreter has no bf16 products
            dtypes.append(torch.bfloat16)
        for dtype in dtypes:
            name = f"{runner.id}-{str(dtype)[6:]}"
            found.append(pytest.param(backend, device, dtype, id=name, marks=runner.marks))
    return found


def own_dtypes_and_shapes():
    """To the compiler float16 is bfloat16: on a GPU our kernel has it at one shape only."""
    found = []
    for runner in own_and_dtypes():
        is_twin = runner.values == ("triton", "cuda", torch.float16)
        for name in ["ragged"] if is_twin else SHAPES:
            values = (*runner.values, SHAPES[name])
            found.append(pytest.param(*values, id=f"{runner.id}-{name}", marks=runner.marks))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_bytes", [True, False], ids=["bytes", "floats"])
@pytest.mark.parametrize(("backend", "device", "dtype", "shape"), own_dtypes_and_shapes())
def test_matches_reference(backend, device, dtype, is_bytes, shape, kind, monkeypatch):
    monkeypatch.setattr(_chunked, "MAX_ELEMENTS", 5000)
    made = make_inputs(*shape, kind, torch.uint8 if is_bytes else dtype, device)
    gold = evaluate(reference.patch_embed, *made, dtype, gold=True)
    eager = evaluate(reference.patch_embed, *made, dtype)
    actual = evaluate(lambda *a, **k: patch_embed(*a, **k, backend=backend), *made, dtype)
    for name, a, e, g in zip(NAMES, actual, eager, gold, strict=False):
        assert_no_worse(name, a, e, g, dtype)


def test_bytes_lose_nothing_in_bfloat16():
    patches, inputs, _ = make_inputs(64, 192, 32, "plain", torch.uint8)
    inputs["weight"] = inputs["weight"].bfloat16().float()
    exact = reference.patch_embed(
        patches, **{n: x.double() for n, x in inputs.items()}, dtype=torch.float64
    )
    found = patch_embed(patches, **inputs, dtype=torch.bfloat16)
    # Rounding the values to bfloat16 first, as eager does, is several times worse.
    eager = reference.patch_embed(patches, **inputs, dtype=torch.bfloat16)
    assert torch.equal(found, exact.bfloat16())
    assert not torch.equal(eager, exact.bfloat16())


def test_masked_patches_reach_nothing_but_the_mask_token():
    patches, inputs, _ = make_inputs(10, 48, 16, "masked", torch.float32)
    mask = torch.arange(10) % 2 == 0
    changed = torch.where(mask[:, None], 7.0, patches)
    a, b = (evaluate(patch_embed, p, inputs, mask, torch.float32)[:5] for p in (patches, changed))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_default_dtype_is_the_patches_or_the_weights():
    patches, inputs, _ = make_inputs(4, 48, 16, "plain", torch.uint8)
    assert patch_embed(patches, **inputs).dtype is torch.float32
    assert patch_embed(patches.bfloat16(), **inputs).dtype is torch.bfloat16


class LargestFloats(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.itemsize)
        return out


def test_bytes_never_become_floats_all_at_once(monkeypatch):
    monkeypatch.setattr(_chunked, "MAX_ELEMENTS", 48 * 100)
    patches, inputs, _ = make_inputs(1000, 48, 16, "plain", torch.uint8)
    args = [patches, *(x.detach() for x in inputs.values())]
    with LargestFloats() as largest:
        _chunked.fwd(*args, None, None, None, torch.float32)
    assert largest.elements == 1000 * 16  # the result


def test_gradcheck():
    patches, inputs, mask = make_inputs(5, 12, 4, "masked", torch.float64)
    inputs = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    fn = lambda p, *a: patch_embed(p, **dict(zip(inputs, a, strict=True)), mask=mask)
    assert torch.autograd.gradcheck(fn, (patches, *inputs.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "device"), OWN)
def test_opcheck_and_fullgraph(backend, device, kind):
    patches, inputs, mask = make_inputs(6, 48, 16, kind, torch.float32, device)
    args = [patches, inputs["weight"], inputs["bias"], inputs.get("posemb"), mask]
    args += [inputs.get("mask_token"), torch.float32, backend]
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.siglip2.patch_embed.default, args, test_utils=utils)
    fn = lambda *a, **k: patch_embed(*a, **k, backend=backend)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    results = (evaluate(f, patches, inputs, mask, torch.float32) for f in (compiled, fn))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 5)}, r"need patches \(T, K\), weight \(D, K\).*\(4, 5\)"),
        ({"patches": torch.zeros(2, 3).int()}, "need patches of uint8 or a floating-point dtype"),
        ({"bias": torch.zeros(5)}, r"need bias \(4,\) of floats; got \(5,\)"),
        ({"posemb": torch.zeros(3, 4)}, r"need posemb \(2, 4\) of floats; got \(3, 4\)"),
        ({"mask": torch.zeros(2, dtype=torch.bool)}, "need both mask and mask_token"),
        (
            {"mask": torch.zeros(2), "mask_token": torch.zeros(4)},
            r"need mask \(2,\) of bool; got \(2,\) torch.float32",
        ),
        ({"dtype": torch.int32}, "need a floating-point dtype; got torch.int32"),
    ],
)
def test_rejects_bad_input_by_name(change, message):
    good = {"patches": torch.zeros(2, 3), "weight": torch.zeros(4, 3), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        patch_embed(**(good | change))


def test_a_forced_backend_never_falls_back():
    with pytest.raises(NotImplementedError, match="backend 'cuda'"):
        patch_embed(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4), backend="cuda")
