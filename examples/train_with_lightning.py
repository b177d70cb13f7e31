"""Train a shared encoder of sampled depth with Lightning.

    python examples/train_with_lightning.py [--steps N]

The data is noise whose loudness is to be found, by every depth alike.  Needs lightning.
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lcconformer import ConformerConfig, ConformerEncoder


class Loudness(lightning.LightningModule):
    """An encoder whose training steps run a random number of its loops."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ConformerEncoder(ConformerConfig(input_dim=8, d_model=32, num_heads=2, num_layers=4))
        self.head = nn.Linear(32, 1)

    def loss(self, batch: list[Tensor], depth: int) -> Tensor:
        features, lengths, loudness = batch
        output, _ = self.encoder(features, lengths, depth=depth)
        return nn.functional.mse_loss(self.head(output.mean(1))[:, 0], loudness)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        # the same depth on every rank
        generator = torch.Generator().manual_seed(self.global_step)
        return self.loss(batch, int(torch.randint(1, 5, (), generator=generator)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    lightning.seed_everything(0)
    loudness = torch.rand(64) * 2
    features = torch.randn(64, 40, 8) * loudness[:, None, None]
    data = TensorDataset(features, torch.full((64,), 40), loudness)
    model = Loudness()
    trainer = lightning.Trainer(
        max_steps=args.steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="auto"
    )
    trainer.fit(model, DataLoader(data, 16, shuffle=True))
    model.eval()
    with torch.no_grad():
        losses = [float(model.loss(list(data.tensors), depth)) for depth in (1, 2, 3, 4)]
    print("error by depth: " + " ".join(f"{loss:.3f}" for loss in losses))


if __name__ == "__main__":
    main()
