"""transformers' Trainer with this loss: negatives from all ranks, in training and in evaluation.

Its `gradient_accumulation_steps` would lose the pairs across micro-batches: see gradcache.py.
"""

import argparse
import math
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import SiglipConfig, SiglipModel, Trainer, TrainingArguments

from siglip2 import SigLipLoss

SIDE, LENGTH, VOCABULARY, NUM_PAIRS = 32, 8, 128, 64


class SigLipTrainer(Trainer):
    """Unit embeddings come from the wrapped model, the learned scalars from the one inside."""

    criterion = SigLipLoss()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        scalars = self.accelerator.unwrap_model(model)
        scale, bias = scalars.logit_scale.exp(), scalars.logit_bias
        loss = self.criterion(out.image_embeds, out.text_embeds, scale, bias)
        return (loss, out) if return_outputs else loss


class RandomPairs(Dataset):
    """Noise to be learned by heart; a processor gives the same keys."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.pixel_values = torch.rand(NUM_PAIRS, 3, SIDE, SIDE, generator=g) * 2 - 1
        self.input_ids = torch.randint(1, VOCABULARY, (NUM_PAIRS, LENGTH), generator=g)

    def __len__(self):
        return NUM_PAIRS

    def __getitem__(self, i):
        return {"pixel_values": self.pixel_values[i], "input_ids": self.input_ids[i]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", help="such as google/siglip2-base-patch16-256")
    parser.add_argument("--batch", type=int, default=32, help="pairs a device and step")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.pretrained:
        model = SiglipModel.from_pretrained(args.pretrained)
    else:
        size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        size["num_attention_heads"] = 2
        vision = {**size, "image_size": SIDE, "patch_size": 8}
        text = {**size, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
        text |= {"bos_token_id": None, "eos_token_id": 1}
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
        # transformers starts both at 0; SigLIP at log 10 and -10.
        torch.nn.init.constant_(model.logit_scale, math.log(10.0))
        torch.nn.init.constant_(model.logit_bias, -10.0)
    has_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            per_device_train_batch_size=args.batch,
            max_steps=args.steps,
            learning_rate=1e-3,
            logging_steps=max(1, args.steps // 4),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            use_cpu=not has_gpu,
            dataloader_pin_memory=has_gpu,
        )
        SigLipTrainer(model, training, train_dataset=RandomPairs()).train()


if __name__ == "__main__":
    main()
