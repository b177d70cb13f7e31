"""Fine-tune a transformers model with its Conformer layers on lcconformer's kernels, by Hugging Face's Trainer.

    python examples/train_with_hf_trainer.py --out DIR [--steps N]

The model is small and its weights and data are random; ``Wav2Vec2ConformerForCTC.from_pretrained(...)`` and a real data set
are treated alike.  What is saved is a checkpoint of transformers, which needs no lcconformer.  Needs transformers, accelerate.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC

import lcconformer


class Noise(Dataset):
    """Half a second of noise, and a transcript of five symbols."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {
            "input_values": torch.randn(8_000, generator=generator),
            "labels": torch.randint(1, 30, (5,), generator=generator),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    config = Wav2Vec2ConformerConfig(
        **sizes, conv_depthwise_kernel_size=7, num_conv_pos_embedding_groups=4, mask_time_prob=0.0, vocab_size=32
    )
    model = Wav2Vec2ConformerForCTC(config)
    print(lcconformer.accelerate(model, strict=True))

    training = TrainingArguments(
        args.out, max_steps=args.steps, per_device_train_batch_size=4, learning_rate=1e-3, save_strategy="no",
        report_to="none", use_cpu=not torch.cuda.is_available(), disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trained = Trainer(model, training, train_dataset=Noise()).train()
    print(f"loss {trained.training_loss:.2f} in the mean of {trained.global_step} steps")

    model.save_pretrained(args.out)
    again = Wav2Vec2ConformerForCTC.from_pretrained(args.out).eval()  # transformers' own layers
    audio = torch.randn(1, 8_000)
    with torch.no_grad():
        difference = (again(audio).logits - model.eval()(audio).logits).abs().max()
    print(f"the checkpoint without lcconformer: logits differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
