"""A small residual network, from scratch, with the Trainer of transformers.

    python examples/train_transformers.py runs/digits/dataset

The model returns logits; the loss is given to the Trainer, because the model's own takes hard labels.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

from diffcal.data.soft_label_dataset import SoftLabelDataset


def collate(items: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Batch under the names that the model and the Trainer use."""
    images, soft_labels = zip(*items, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(soft_labels)}


def soft_cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Mean cross-entropy of the logits to the soft labels."""
    return F.cross_entropy(outputs["logits"], labels)


class SoftLabelResNet(ResNetForImageClassification):
    """The library's classifier, which leaves the loss to the Trainer."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Logits without a loss, whatever the labels."""
        return super().forward(pixel_values, **kwargs)


def main() -> dict[str, float]:
    """Losses of the first and the last step."""
    parser = argparse.ArgumentParser(
        description="A small residual network, from scratch, with the Trainer of transformers."
    )
    parser.add_argument("dataset", help="published data set folder")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()

    torch.manual_seed(0)
    data = SoftLabelDataset(args.dataset)
    config = ResNetConfig(
        num_channels=data[0][0].shape[0],
        embedding_size=32,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(data.class_names)),
        label2id={name: index for index, name in enumerate(data.class_names)},
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=SoftLabelResNet(config),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=32,
                learning_rate=3e-3,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                dataloader_drop_last=True,  # BatchNorm needs more than one image
                remove_unused_columns=False,
                disable_tqdm=True,
            ),
            train_dataset=data,
            data_collator=collate,
            compute_loss_func=soft_cross_entropy,
        )
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}


if __name__ == "__main__":
    print(json.dumps(main()))
