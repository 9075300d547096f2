"""fully_shard (FSDP2) with negatives from all ranks, by the ring that never holds them all."""

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from two_towers import TwoTowers, arguments, pairs

from siglip2 import SigLipLoss


def main() -> None:
    args = arguments(__doc__)
    local_rank = int(os.environ["LOCAL_RANK"])
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpu else "gloo")

    torch.manual_seed(0)
    model = TwoTowers(args.width, args.depth).to(device)
    # Each tower is sharded by itself, so that calling it gathers its weights. The two scalars are
    # read outside a forward, and FSDP2 cannot shard shape (): they stay whole.
    for module in (model.image, model.text):
        for layer in module:
            if isinstance(layer, torch.nn.Linear):
                fully_shard(layer)
        fully_shard(module)
    scalars = [model.log_scale, model.bias]
    criterion = SigLipLoss(dist_impl="ring", normalize=True, check_shapes=True)
    # A group of their own: an optimizer's fused update takes sharded or whole tensors, not both.
    sharded = [*model.image.parameters(), *model.text.parameters()]
    optimizer = torch.optim.AdamW([{"params": sharded}, {"params": scalars}], lr=3e-3)
    data = pairs(args.batch, device, seed=dist.get_rank())
    for step in range(args.steps):
        image, text = next(data)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_gpu):
            image_features, text_features = model.image(image), model.text(text)
        loss = criterion(image_features, text_features, model.log_scale.exp(), model.bias)
        loss.backward()
        for scalar in scalars:  # FSDP2 averages the others
            dist.all_reduce(scalar.grad)
            scalar.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            value = loss.detach()
            dist.all_reduce(value)  # the mean over ranks is the loss of the global batch
            if dist.get_rank() == 0:
                print(f"step {step} loss {value.item() / dist.get_world_size():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
