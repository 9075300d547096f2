"""Specification: AdamW (arXiv:1711.05101, algorithm 2, as torch.optim.AdamW), then the EMA.

Any float dtype. The teacher averages the new weights: Mean Teacher (arXiv:1703.01780).
"""

from .inputs import Settings, Tensors


def step(tensors: Tensors, settings: Settings) -> None:
    """In place; nothing happens where `found_inf` is 1."""
    s = settings
    if s.found_inf is not None and bool(s.found_inf):
        return
    for p, g, m, v, count, teacher, copy, teacher_copy in zip(*tensors, strict=True):
        if s.grad_scale is not None:
            g = g / s.grad_scale.to(p.dtype)
        if s.clip_coefficient is not None:
            g = g * s.clip_coefficient.to(p.dtype)
        count += 1
        t = float(count)
        m.copy_(s.beta1 * m + (1 - s.beta1) * g)
        v.copy_(s.beta2 * v + (1 - s.beta2) * g * g)
        m_hat, v_hat = m / (1 - s.beta1**t), v / (1 - s.beta2**t)
        p -= float(s.lr) * (float(s.weight_decay) * p + m_hat / (v_hat.sqrt() + s.eps))
        if teacher is not None:
            teacher += (1 - float(s.momentum)) * (p - teacher)
        if copy is not None:
            copy.copy_(p)
        if teacher_copy is not None:
            teacher_copy.copy_(teacher)
