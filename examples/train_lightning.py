"""Mixed images and their soft labels in a Lightning module.

python examples/train_lightning.py runs/digits/dataset
"""

import argparse
import json

import lightning
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from diffcal.data.soft_label_dataset import SoftLabelDataset
from diffcal.models.registry import build_classifier


class SoftLabelClassifier(lightning.LightningModule):
    """A classifier that learns from distributions over classes."""

    def __init__(self, num_classes: int, channels: int, side: int) -> None:
        super().__init__()
        self.model = build_classifier(
            "cnn-tiny", num_classes, in_channels=channels, image_size=side
        )
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Soft cross-entropy of a batch."""
        image, soft_label = batch
        loss = F.cross_entropy(self.model(image), soft_label)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> dict[str, float]:
    """Losses of the first and the last step."""
    parser = argparse.ArgumentParser(
        description="Mixed images and their soft labels in a Lightning module."
    )
    parser.add_argument("dataset", help="published data set folder")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    data = SoftLabelDataset(args.dataset)
    channels, side, _ = data[0][0].shape
    module = SoftLabelClassifier(len(data.class_names), channels, side)
    trainer = lightning.Trainer(
        max_steps=args.steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True))
    return {
        "steps": len(module.losses),
        "first_loss": module.losses[0],
        "last_loss": module.losses[-1],
    }


if __name__ == "__main__":
    print(json.dumps(main()))
