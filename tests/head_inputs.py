"""Hidden states, heads and targets for tests of the linear cross entropy."""

import torch

# (T, V, D). The tiles of all backends divide 128; the ragged sizes do not.
SHAPES = {
    "two-words": (3, 2, 16),
    "one-token": (1, 5, 16),
    "one-tile": (128, 128, 64),
    "ragged": (131, 259, 40),
    "wide": (5, 1000, 33),
    "so400m": (140, 150, 1152),
}

# Every option of the loss; the Triton design has none for the last.
OPTIONS = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "capped": {"softcap": 5.0, "z_loss": 1e-2},
    "everything": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0},
}


def make_head(T, V, D, dtype, device="cpu", std=2.0):
    """x, weight and bias whose logits have this standard deviation."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(T, D, generator=g)
    weight = torch.randn(V, D, generator=g) * std / D**0.5
    bias = torch.randn(V, generator=g)
    inputs = x.to(dtype), weight.to(dtype), bias.to(torch.promote_types(dtype, torch.float32))
    return [t.to(device).requires_grad_() for t in inputs]


def make_target(T, V, device="cpu"):
    """Every fifth token is ignored."""
    target = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(1))
    target[4::5] = -100
    return target.to(device)


def make_token_weight(T, device="cpu"):
    """As of captions normalised by their lengths, one token of weight 0."""
    weight = 7 * torch.rand(T, generator=torch.Generator().manual_seed(2))
    weight[0] = 0 if T > 1 else 1
    return weight.to(device)


def make_extreme(dtype, device="cpu", T=150, V=400, D=64):
    """Logits of standard deviation 8, of +-200 for four tokens; targets at either end of those."""
    x, weight, _ = (t.detach().cpu().double() for t in make_head(T, V, D, torch.float32, std=8.0))
    target = make_target(T, V)
    for row, largest in ((3, 200.0), (5, -200.0), (130, 200.0), (131, 200.0)):
        z = x[row] @ weight.T
        x[row] *= largest / z[z.abs().argmax()]
    z = x @ weight.T
    target[3], target[5], target[130] = z[3].argmin(), z[5].argmin(), z[130].argmax()
    x, weight = (t.to(device, dtype).requires_grad_() for t in (x, weight))
    return x, weight, target.to(device)
