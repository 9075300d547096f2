"""SigLipLoss in a loop of your own: any model with two towers, any optimizer, one device."""

import torch
from two_towers import TwoTowers, arguments, pairs

from siglip2 import SigLipLoss

args = arguments(__doc__)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
model = TwoTowers(args.width, args.depth).to(device)
# normalize: the loss takes the towers' output as it is, bf16 under autocast.
criterion = SigLipLoss(normalize=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
data = pairs(args.batch, device)

for step in range(args.steps):
    image, text = next(data)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        image_features, text_features = model.image(image), model.text(text)
    loss = criterion(image_features, text_features, model.log_scale.exp(), model.bias)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == args.steps - 1:
        print(f"step {step} loss {loss.item():.4f} temperature {model.log_scale.exp().item():.2f}")
