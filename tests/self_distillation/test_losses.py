"""Both losses against the published formulas in eager float64, logits and all."""

import math
import re

import pytest
import torch

from siglip2.self_distillation import (
    HeadConfig,
    HeadOutput,
    MaskedPredictionLoss,
    SelfDistillationLoss,
    TaughtHead,
    draw_masks,
)

EPS = torch.finfo(torch.float64).eps
K, WIDTH, B, V = 23, 16, 4, 3
SMALL = HeadConfig(hidden_width=24, bottleneck=8, prototypes=K)
LOSSES = {"distillation": SelfDistillationLoss, "masked": MaskedPredictionLoss}


def make_head(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    head = TaughtHead(WIDTH, SMALL)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return head.to(dtype)


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)


def logits(out):  # of a head
    w = out.prototypes
    return out.z @ (w / (w.norm(dim=1, keepdim=True) + 1e-8)).T


def sinkhorn_knopp(t, temp, iterations=3):
    """DINOv2's, on all rows."""
    q = (t / temp).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / K
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def eager_probabilities(loss, taught):
    t = logits(taught)
    if loss.centre is None:
        return sinkhorn_knopp(t, loss.teacher_temp)
    return ((t - loss.centre) / loss.teacher_temp).softmax(1)


def eager_distillation(loss, student, taught):
    """Mean over all pairs of an image's local views with its global view."""
    p = eager_probabilities(loss, taught)
    q = (logits(student) / loss.student_temp).log_softmax(1)
    pairs = [-(p[v // V] * q[v]).sum() for v in range(len(q))]
    return sum(pairs) / len(pairs)


def eager_masked(loss, student, taught, weight=None):
    p = eager_probabilities(loss, taught)
    losses = -(p * (logits(student) / loss.student_temp).log_softmax(1)).sum(1)
    return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()


def gradients(loss, x, head):
    named = dict(head.student.named_parameters())
    grads = torch.autograd.grad(loss, [x, *named.values()])
    return dict(zip(["x", *named], grads, strict=True))


def assert_same(found, wanted, x, head):
    assert found.item() == pytest.approx(wanted.item(), rel=2**12 * EPS)
    ours, theirs = gradients(found, x, head), gradients(wanted, x, head)
    for name, gold in theirs.items():
        assert (ours[name] - gold).abs().max() <= 2**14 * EPS * gold.abs().max(), name


def make_loss(name, **options):
    loss = LOSSES[name](K, **options).double()
    if loss.centre is not None:
        generator = torch.Generator().manual_seed(5)
        loss.centre.copy_(0.2 * torch.randn(K, generator=generator, dtype=torch.float64))
    return loss


@pytest.mark.parametrize("temps", [(0.1, 0.04), (0.5, 1.0)], ids=str)
@pytest.mark.parametrize("balance", ["centring", "sinkhorn"])
def test_self_distillation_equals_its_formula(balance, temps):
    head, x, whole = make_head(), rows(B * V).requires_grad_(), rows(B, seed=1)
    options = {"student_temp": temps[0], "teacher_temp": temps[1], "balance": balance}
    loss = make_loss("distillation", **options)
    found = loss(head(x), head.teach(whole))
    assert_same(found, eager_distillation(loss, head(x), head.teach(whole)), x, head)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("balance", ["centring", "sinkhorn"])
def test_masked_prediction_equals_its_formula(balance, weighted):
    head, x, seen = make_head(), rows(9).requires_grad_(), rows(9, seed=1)
    loss = make_loss("masked", balance=balance)
    weight = torch.rand(9).double() if weighted else None
    found = loss(head(x), head.teach(seen), weight=weight)
    assert_same(found, eager_masked(loss, head(x), head.teach(seen), weight), x, head)


@pytest.mark.parametrize("name", LOSSES)
def test_a_part_of_a_batch_is_a_part_of_its_loss(name):
    """With what the whole batch divides by, the parts add up."""
    head, loss = make_head(), make_loss(name)
    x, whole = rows(B * V), rows(B, seed=1)
    if name == "masked":
        whole = rows(B * V, seed=1)
        total = loss(head(x), head.teach(whole), weight=torch.ones(B * V).double() / V)
        weights = {"weight": torch.ones(2 * V).double() / V}
    else:
        total, weights = loss(head(x), head.teach(whole)), {}
    parts = [
        loss(head(a), head.teach(b), num_images=B, **weights)
        for a, b in zip(x.chunk(2), whole.chunk(2), strict=True)
    ]
    assert sum(parts).item() == pytest.approx(total.item(), rel=64 * EPS)


@pytest.mark.parametrize("name", LOSSES)
def test_centre_is_the_moving_mean_of_the_teachers_logits(name):
    head, loss = make_head(), LOSSES[name](K, centre_momentum=0.8).double()
    wanted = torch.zeros(K, dtype=torch.float64)
    for step in range(5):
        seen = []
        for part in range(2):  # of a batch
            t = head.teach(rows(3 + part, seed=10 * step + part))
            targets = loss.targets(t)
            assert (targets.bias + wanted / loss.teacher_temp).abs().max() <= 64 * EPS
            seen.append(logits(t))
        loss.update_centre()
        wanted = 0.8 * wanted + 0.2 * torch.cat(seen).mean(0)
        assert (loss.centre - wanted).abs().max() <= 64 * EPS
    loss.targets(head.teach(rows(3)))
    loss.forget()
    loss.update_centre()
    loss.eval().targets(head.teach(rows(3)))
    loss.update_centre()
    assert (loss.centre - wanted).abs().max() <= 64 * EPS


def test_centre_is_in_the_state_dict_and_sinkhorn_has_none():
    loss = make_loss("masked")
    other = MaskedPredictionLoss(K)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.centre, loss.centre.float())
    assert not MaskedPredictionLoss(K, balance="sinkhorn").state_dict()


def test_all_tokens_are_ibots_plus_plus():
    """Hidden patches' mean plus `visible` times the others' mean, of every image alike."""
    grids, head, loss = [(2, 3), (3, 3), (1, 4)], make_head(), make_loss("masked")
    masks = draw_masks(grids, 0.5, generator=torch.Generator().manual_seed(0))
    T = len(masks.mask)
    x, seen = rows(T), rows(T, seed=1)
    found = loss(head(x), head.teach(seen), weight=masks.all_weights(0.25).double(), num_images=3)
    p = eager_probabilities(loss, head.teach(seen))
    losses = -(p * (logits(head(x)) / loss.student_temp).log_softmax(1)).sum(1)
    wanted, lengths = 0, [h * w for h, w in grids]
    for of_image, mask in zip(losses.split(lengths), masks.mask.split(lengths), strict=True):
        wanted += (of_image[mask].mean() + 0.25 * of_image[~mask].mean()) / 3
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)  # weights are float32


def test_teacher_gets_no_gradient():
    head = make_head()
    whole = rows(B).requires_grad_()
    loss = make_loss("distillation")
    teacher = HeadOutput(*head.student(whole))  # somebody's, who forgot
    loss(head(rows(B * V)), teacher).backward()
    assert whole.grad is None


def test_a_teacher_that_is_sure_is_learned_from():
    """A few steps on one batch: the loss falls towards the teacher's own entropy."""
    head, loss = make_head(dtype=torch.float32), SelfDistillationLoss(K)
    x, whole = rows(B * V).float(), rows(B, seed=1).float()
    optimizer = torch.optim.Adam(head.student.parameters(), lr=3e-3)
    taught = head.teach(whole)
    p = eager_probabilities(loss, taught)
    entropy = -(p * p.clamp(min=1e-30).log()).sum(1).mean().item()
    values = []
    for _ in range(150):
        value = loss(head(x), taught)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[0] > entropy + 1
    assert values[-1] < entropy + 0.05


def test_two_runs_are_bit_equal():
    results = []
    for _ in range(2):
        head, x = make_head(dtype=torch.float32), rows(B * V).float().requires_grad_()
        loss = SelfDistillationLoss(K)
        value = loss(head(x), head.teach(rows(B, seed=1).float()))
        results.append([value.detach(), *gradients(value, x, head).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_of_tokens_by_prototypes_is_kept():
    tokens, prototypes = 4096, 16384
    config = HeadConfig(depth=1, bottleneck=8, prototypes=prototypes)
    head, loss = TaughtHead(WIDTH, config), MaskedPredictionLoss(prototypes)
    x, seen, largest = rows(tokens).float().requires_grad_(), rows(tokens, seed=1).float(), []

    def note(tensor):
        largest.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss(head(x), head.teach(seen))
    assert max(largest) < tokens * prototypes


def test_no_rows_cost_nothing():
    head, x = make_head(), rows(0).requires_grad_()
    for name in LOSSES:
        value = make_loss(name)(head(x), head.teach(rows(0)))
        value.backward()
        assert value.item() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: SelfDistillationLoss(K, balance="center"),
         "need balance 'centring' or 'sinkhorn'; got 'center'"),
        (lambda h: SelfDistillationLoss(K, teacher_temp=0.0),
         "need temperatures above 0; got 0.1 and 0.0 (student, teacher)"),
        (lambda h: SelfDistillationLoss(K).double()(h(rows(7)), h.teach(rows(3))),
         "need as many views of each image; got 7 views of 3 images"),
        (lambda h: MaskedPredictionLoss(K).double()(h(rows(7)), h.teach(rows(3))),
         "need as many patches of teacher and student; got 3 and 7"),
        (lambda h: MaskedPredictionLoss(K).double()(
            h(rows(3)), h.teach(rows(3)), weight=torch.ones(2)),
         "need as many patches of teacher and student; got 3 and 3 and weights (2,)"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(make_head())


def test_initial_loss_is_near_the_log_of_the_number_of_prototypes():
    """Random unit rows in 256 dimensions: logits of deviation 1/16, over 0.1."""
    config = HeadConfig(prototypes=2048)
    head, loss = TaughtHead(WIDTH, config), SelfDistillationLoss(2048)
    value = loss(head(rows(64).float()), head.teach(rows(64, seed=1).float()))
    assert value.item() == pytest.approx(math.log(2048), abs=0.6)
