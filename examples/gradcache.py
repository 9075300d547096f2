"""A batch whose activations do not fit, in micro-batches, with the loss of the whole batch.

Adding up the losses of micro-batches would lose the pairs across them. GradCache
(arXiv:2101.06983): embed every micro-batch without a graph; take the loss over all pairs and the
gradient of each embedding; run every micro-batch again with its gradient. This prints how far
that is from the step with everything in memory. Towers with dropout must draw the same mask in
both passes (keep and restore the generator's state around them).
"""

import torch
from torch import Tensor
from two_towers import TwoTowers, arguments, pairs

from siglip2 import SigLipLoss
from siglip2_kernels import sigmoid_loss_and_grads

NUM_PARTS = 4


def cached_backward(model: TwoTowers, image: Tensor, text: Tensor) -> Tensor:
    """Loss of the whole batch; every parameter's `.grad` as `loss.backward()` would leave it."""
    towers = (model.image, model.text)
    inputs = tuple(x.chunk(NUM_PARTS) for x in (image, text))
    with torch.no_grad():
        img, txt = (
            torch.cat([tower(part) for part in parts])
            for tower, parts in zip(towers, inputs, strict=True)
        )
    out = sigmoid_loss_and_grads(img, txt, model.log_scale, model.bias, normalize=True)
    for tower, parts, grad in zip(towers, inputs, (out.dimg, out.dtxt), strict=True):
        for part, dpart in zip(parts, grad.chunk(NUM_PARTS), strict=True):
            features = tower(part)
            features.backward(dpart.to(features.dtype))
    model.log_scale.grad, model.bias.grad = out.dlog_scale, out.dbias
    return out.loss


def plain_backward(model: TwoTowers, image: Tensor, text: Tensor) -> Tensor:
    criterion = SigLipLoss(normalize=True)
    loss = criterion(model.image(image), model.text(text), model.log_scale.exp(), model.bias)
    loss.backward()
    return loss.detach()


def take_gradients(model: TwoTowers) -> list[Tensor]:
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    return gradients


def main() -> None:
    args = arguments(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = TwoTowers(args.width, args.depth).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = pairs(args.batch, device)

    batch = next(data)
    plain, expected = plain_backward(model, *batch), take_gradients(model)
    cached, actual = cached_backward(model, *batch), take_gradients(model)
    differences = [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(actual, expected, strict=True)
    ]
    print(f"plain {plain.item():.6f} cached {cached.item():.6f}")
    print(f"largest relative gradient difference {max(differences):.1e}")

    for step in range(args.steps):
        loss = cached_backward(model, *next(data))
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step} loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
