import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from siglip2_kernels import sigmoid_loss
from siglip2_kernels.sigmoid_loss import _chunked, op, reference
from siglip2_kernels.sigmoid_loss.inputs import Pairs
from strategies import make_inputs, make_pairs


@pytest.mark.parametrize("normalize", [False, True])
def test_saved_memory_does_not_grow_with_the_pairs(normalize):
    def saved_bytes(M):
        img, txt, *scalars = make_inputs(64, M, 16, torch.bfloat16)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel() * x.element_size()) or x, lambda x: x
        ):
            ids = {"img_ids": torch.arange(64), "txt_ids": torch.arange(M)}
            sigmoid_loss(img, txt, *scalars, **ids, normalize=normalize)
        return sum(sizes)

    # Float32 gradients of each embedding, and a few scalars; normalised bfloat16 inputs as well.
    for M in (64, 4096):
        assert saved_bytes(M) - (6 if normalize else 4) * 16 * (64 + M) < 100


@pytest.mark.parametrize("normalize", [False, True])
def test_without_gradients_nothing_as_large_as_an_input_is_kept(normalize):
    # 2 B M D FLOPs and no float32 gradient: what the op returns without autograd is scalars.
    inputs = make_inputs(64, 64, 16, torch.float32)
    real, returned = op.fwd, []

    def spy(*args):
        returned.append(real(*args))
        return returned[-1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(op, "fwd", spy)
        sigmoid_loss(*inputs, normalize=normalize)
    assert [x.numel() for x in returned[0]] == [3, 0, 0]


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return out


@pytest.mark.parametrize("kind", ["diagonal", "ignored", "ids", "weighted"])
def test_chunked_never_holds_more_than_a_chunk_of_the_pairs(kind, monkeypatch):
    # The mode cannot look inside a registered op, so the backend is called as the op calls it.
    monkeypatch.setitem(_chunked.MAX_ELEMENTS, "cpu", 20_000)
    inputs = [x.detach() for x in make_inputs(500, 500, 16, torch.float32)]
    pairs = make_pairs(kind, 500, 500)
    named = [pairs.get(name) for name in Pairs._fields]
    with LargestTensor() as chunked:
        _chunked.fwd(*inputs, *named, True, True)
    with LargestTensor() as eager:
        reference.sigmoid_loss(*inputs, **pairs)
    assert (chunked.elements, eager.elements) == (20_000, 250_000)


@pytest.mark.parametrize(
    ("learned", "products"), [((), 1), ((2, 3), 1), ((0,), 2), ((0, 1, 2, 3), 3)]
)
def test_only_the_products_that_are_needed_run(learned, products, monkeypatch):
    calls = []
    for name in ("mm_f32", "addmm_f32_"):
        real = getattr(_chunked, name)
        counted = lambda *a, real=real, **k: calls.append(1) or real(*a, **k)
        monkeypatch.setattr(_chunked, name, counted)
    inputs = [x.detach() for x in make_inputs(8, 8, 16, torch.float32)]
    for i in learned:
        inputs[i].requires_grad_()
    sigmoid_loss(*inputs, backend="chunked")
    assert len(calls) == products
    with torch.no_grad():
        sigmoid_loss(*inputs, backend="chunked")
    assert len(calls) == products + 1
