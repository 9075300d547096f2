"""open_clip's training step with one line changed: where SigLipLoss comes from."""

import torch

try:
    import open_clip
    from open_clip.loss import SigLipLoss as TheirLoss
except ImportError:
    raise SystemExit("this example needs open_clip: pip install open_clip_torch") from None

from siglip2 import SigLipLoss  # was: from open_clip.loss import SigLipLoss

STEPS, BATCH, SIDE, LENGTH, VOCABULARY = 40, 16, 32, 16, 256

torch.manual_seed(0)
model = open_clip.CustomTextCLIP(
    embed_dim=64,
    vision_cfg={"layers": 2, "width": 64, "patch_size": 8, "image_size": SIDE},
    text_cfg={
        "layers": 2,
        "width": 64,
        "heads": 2,
        "context_length": LENGTH,
        "vocab_size": VOCABULARY,
    },
    init_logit_scale=2.3026,  # log 10
    init_logit_bias=-10.0,
    output_dict=True,
)
loss = SigLipLoss(rank=0, world_size=1)
theirs = TheirLoss(rank=0, world_size=1)  # to see that nothing changed
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
images = torch.rand(BATCH, 3, SIDE, SIDE)
texts = torch.randint(1, VOCABULARY, (BATCH, LENGTH))

for step in range(STEPS):
    model_out = model(images, texts)
    losses = loss(**model_out, output_dict=True)
    total_loss = sum(losses.values())
    if step % 10 == 0 or step == STEPS - 1:
        with torch.no_grad():
            check = theirs(**model_out)
        print(f"step {step} open_clip {check.item():.4f} loss {total_loss.item():.4f}")
    total_loss.backward()
    optimizer.step()
    optimizer.zero_grad()
