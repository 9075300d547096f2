"""The gathered loss: what travels, when, and what stays in memory."""

import gc
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ranks import run
from siglip2 import distributed, gather
from siglip2.distributed import gather_counts
from siglip2.losses import SigLipLoss

D = 16
WORLD = 2
SCALARS = torch.tensor(10.0), torch.tensor(-5.0)


class Recorder:
    """Writes down what crosses ranks, and what else happens, in order."""

    def __init__(self):
        self.events, self.tensors = [], []
        self._wrap(distributed, "_all_gather", "gather")
        self._wrap(distributed, "_reduce_scatter", "reduce")
        self._wrap_wait(gather.PendingRows, "gather awaited")
        self._wrap_wait(gather.PendingSum, "reduce awaited")

    def _wrap(self, module, name, event):
        original = getattr(module, name)

        def call(out, sent, **options):
            if sent.is_floating_point():  # counts are not what is meant
                assert options["async_op"]
                self.events.append(event)
                self.tensors.append((out, sent))
            return original(out, sent, **options)

        setattr(module, name, call)

    def _wrap_wait(self, cls, event):
        original = cls.wait

        def wait(pending):
            self.events.append(event)
            return original(pending)

        cls.wait = wait

    def layer(self, name: str) -> nn.Module:
        layer = nn.Linear(D, D)
        layer.register_forward_hook(lambda *_: self.events.append(f"{name} forward"))
        layer.weight.register_hook(lambda _: self.events.append(f"{name} backward"))
        return layer

    def take(self) -> list[str]:
        taken = list(self.events)
        self.events.clear()
        return taken


def order_of_events(recorder, rank):
    text, image = (nn.Sequential(*(recorder.layer(n) for _ in "ab")) for n in ("text", "image"))
    x, loss = torch.randn(4, D), SigLipLoss(normalize=True)
    pending = loss.start_gather(text(x), num_images=4)
    loss(image(x), pending, *SCALARS).backward()
    return recorder.take()


def what_frozen_towers_send(recorder, rank):
    found = {}
    for frozen in ("", "img", "txt", "both"):
        img, txt = (
            torch.randn(4, D).requires_grad_(frozen not in (name, "both"))
            for name in ("img", "txt")
        )
        loss = SigLipLoss()(img, txt, torch.tensor(1.0, requires_grad=True))
        loss.backward()
        found[frozen] = recorder.take()
    with torch.no_grad():
        SigLipLoss()(torch.randn(4, D), torch.randn(4, D).requires_grad_(), *SCALARS)
    found["no_grad"] = recorder.take()
    # A sum nobody waits for does not reach the next backward.
    img, txt = (torch.randn(4, D, requires_grad=True) for _ in range(2))
    loss = SigLipLoss()(img, txt, *SCALARS)
    torch.autograd.grad(loss, img, retain_graph=True)
    found["img alone"] = recorder.take()
    (alone,) = torch.autograd.grad(loss, txt, retain_graph=True)
    recorder.take()
    loss.backward()
    found["then all"] = recorder.take()
    found["then all the same"] = torch.equal(alone, txt.grad)
    return found


def copies_and_dtypes(recorder, rank):
    """Of bfloat16 features in equal numbers."""
    recorder.tensors.clear()
    seen = {}
    txt = torch.randn(4, D, dtype=torch.bfloat16).requires_grad_()
    img = torch.randn(4, D, dtype=torch.bfloat16).requires_grad_()
    loss = SigLipLoss(normalize=True)(img, txt, *SCALARS)
    (gathered, sent), *_ = recorder.tensors
    seen["sent as it is"] = sent.data_ptr() == txt.data_ptr()
    seen["rows"] = len(gathered)
    loss.backward()
    out, sums = recorder.tensors[1]
    seen["wire"] = [str(x.dtype) for x in (sent, sums, out)]
    seen["gradients"] = [str(x.grad.dtype) for x in (img, txt)]
    return seen


def memory(recorder, rank):
    """Bytes saved for the backward at two sizes; whether the gathered texts are still held."""
    found = []
    for num_rows in (32, 64):
        recorder.tensors.clear()
        img, txt = (torch.randn(num_rows, D, requires_grad=True) for _ in range(2))
        storages = {}

        def pack(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = SigLipLoss()(img, txt, *SCALARS)
        texts = weakref.ref(recorder.tensors[0][0])
        recorder.tensors.clear()
        found.append((sum(storages.values()), _is_freed(texts), bool(loss.requires_grad)))
    return found


def _is_freed(tensor: weakref.ref, seconds: float = 30) -> bool:
    """gloo's thread lets go of what it has sent a moment after the waiting thread goes on."""
    end = time.monotonic() + seconds
    while tensor() is not None and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return tensor() is None


def weighted_ranks(recorder, rank):
    """Each rank weights its loss by another number; gradients of texts must keep them apart."""
    g = torch.Generator().manual_seed(0)
    img, txt = (torch.randn(4, D, generator=g, dtype=torch.float64) for _ in range(2))
    mine = txt[2 * rank : 2 * rank + 2].requires_grad_()
    loss = SigLipLoss()(img[2 * rank : 2 * rank + 2], mine, *SCALARS)
    (loss * (rank + 1)).backward()
    whole = txt.detach().clone().requires_grad_()
    z = 10 * img @ whole.T - 5
    z = torch.where(torch.eye(4, dtype=torch.bool), -z, z)
    rows = torch.nn.functional.softplus(z, threshold=40).sum(1) / 2
    (rows * torch.tensor([1.0, 1.0, 2.0, 2.0])).sum().backward()
    error = (mine.grad - whole.grad[2 * rank : 2 * rank + 2]).abs().max()
    return float(error / whole.grad.abs().max())


def everything(rank, world):
    # Nothing can be read from a meta tensor: counts cross ranks on the host.
    counts = gather_counts((rank, 7), torch.device("meta"), None)
    recorder = Recorder()
    checks = (order_of_events, what_frozen_towers_send, copies_and_dtypes, memory, weighted_ranks)
    found = {check.__name__: check(recorder, rank) for check in checks}
    dist.barrier()
    return {"counts": counts, **found}


@pytest.fixture(scope="module")
def found():
    return run(WORLD, everything)


@pytest.mark.dist
def test_both_exchanges_run_behind_the_image_tower(found):
    tower = ["image forward"] * 2
    expected = ["text forward"] * 2 + ["gather", *tower, "gather awaited", "reduce"]
    expected += ["image backward"] * 2 + ["reduce awaited"] + ["text backward"] * 2
    assert [share["order_of_events"] for share in found] == [expected] * WORLD


@pytest.mark.dist
def test_gradients_are_sent_only_if_texts_take_them(found):
    forward, backward = ["gather", "gather awaited"], ["reduce", "reduce awaited"]
    for share in found:
        assert share["what_frozen_towers_send"] == {
            "": forward + backward,
            "img": forward + backward,
            "txt": forward,
            "both": forward,
            "no_grad": forward,
            "img alone": [*forward, "reduce"],
            "then all": backward,
            "then all the same": True,
        }


@pytest.mark.dist
def test_equal_numbers_travel_without_a_copy_and_gradients_in_float32(found):
    bf16, f32 = "torch.bfloat16", "torch.float32"
    for share in found:
        assert share["copies_and_dtypes"] == {
            "sent as it is": True,
            "rows": 4 * WORLD,
            "wire": [bf16, f32, f32],
            "gradients": [bf16, bf16],
        }


@pytest.mark.dist
def test_saved_bytes_are_one_gradient_of_local_images_and_of_all_texts(found):
    for share in found:
        for num_rows, (saved, is_freed, _) in zip((32, 64), share["memory"], strict=True):
            features = 4 * D * (num_rows + WORLD * num_rows)
            assert features <= saved <= features + 64  # a few scalars
            assert is_freed, "the gathered texts outlive the forward"


@pytest.mark.dist
def test_ranks_may_weight_their_losses_apart(found):
    for share in found:
        assert share["weighted_ranks"] <= 64 * torch.finfo(torch.float64).eps


@pytest.mark.dist
def test_counts_cross_ranks_on_the_host(found):
    assert [share["counts"] for share in found] == [[(0, 7), (1, 7)]] * WORLD
