"""DistributedDataParallel with negatives from all ranks, their exchange behind the image tower."""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from two_towers import TwoTowers, arguments, pairs

from siglip2 import SigLipLoss


class Task(nn.Module):
    """Towers and loss in one forward, as DDP wants them."""

    def __init__(self, model: TwoTowers):
        super().__init__()
        self.model = model
        self.criterion = SigLipLoss(normalize=True, check_shapes=True)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        # Texts first: they travel while the image tower runs, and so do their gradients.
        texts = self.criterion.start_gather(self.model.text(text), num_images=len(image))
        image_features = self.model.image(image)
        return self.criterion(image_features, texts, self.model.log_scale.exp(), self.model.bias)


def main() -> None:
    args = arguments(__doc__)
    local_rank = int(os.environ["LOCAL_RANK"])
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpu else "gloo")

    torch.manual_seed(0)
    task = Task(TwoTowers(args.width, args.depth).to(device))
    task = nn.parallel.DistributedDataParallel(task)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    data = pairs(args.batch, device, seed=dist.get_rank())
    for step in range(args.steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=has_gpu):
            loss = task(*next(data))
        loss.backward()
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
