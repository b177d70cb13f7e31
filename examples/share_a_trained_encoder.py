"""Make a shared encoder of a trained one with a layer for every depth, and fine-tune it to compute the same.

    python examples/share_a_trained_encoder.py

Prints the error of the hidden states at every depth, on features that neither training sees, before and after.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

import lcconformer
from lcconformer import ConformerConfig, ConformerEncoder


def features(batch: int = 8, frames: int = 40) -> Tensor:
    """Stand-in for speech ``[batch, frames, 20]``: slow random movements of a few sources, mixed."""
    mixing = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    return torch.randn(batch, frames, 4).cumsum(1).tanh() @ mixing


def train(encoder: ConformerEncoder, steps: int) -> None:
    """Pretrain ``encoder`` in place: predict from a masked input what was masked, at the last depth."""
    head = torch.nn.Linear(encoder.config.d_model, 20)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(steps):
        x = features()
        masked = torch.rand(x.shape[:2]) < 0.3
        output, _ = encoder.train()(x.masked_fill(masked[..., None], 0.0))
        loss = F.mse_loss(head(output)[masked], x[masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.eval()


def distil(teacher: ConformerEncoder, student: ConformerEncoder, steps: int) -> None:
    """Fine-tune ``student`` in place towards the hidden states of ``teacher`` at every depth."""
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    student.train()
    for _ in range(steps):
        x = features()
        with torch.no_grad():
            want = teacher(x, return_hidden_states=True)[2][1:]
        got = student(x, return_hidden_states=True)[2][1:]
        loss = sum(((g - w).square().mean() / w.square().mean() for g, w in zip(got, want)), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    student.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Share the layers of a trained encoder and fine-tune the result.")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each training (default 100)")
    args = parser.parse_args()
    torch.manual_seed(0)

    config = ConformerConfig(
        input_dim=20, d_model=32, num_heads=2, ffn_dim=64, num_layers=4, conv_kernel_size=7, dropout=0.0, sharing="none"
    )
    encoder = ConformerEncoder(config)
    train(encoder, args.steps)

    held_out = features(16)
    for method in ("average", "svd-lora"):
        shared = lcconformer.share(encoder, method, lora_rank=4)
        before = lcconformer.depth_errors(encoder, shared, held_out)
        distil(encoder, shared, args.steps)
        after = lcconformer.depth_errors(encoder, shared, held_out)
        kept = shared.summary().unique / encoder.summary().unique
        print(f"{method}: {kept:.0%} of the parameters")
        print("  error by depth before:", " ".join(f"{error:.3f}" for error in before))
        print("  error by depth after: ", " ".join(f"{error:.3f}" for error in after))


if __name__ == "__main__":
    main()
