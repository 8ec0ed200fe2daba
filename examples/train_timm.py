"""A timm network with timm's own augmentation and soft cross-entropy.

    python examples/train_timm.py runs/digits/dataset

timm imports torchvision, so this example needs both.
"""

import argparse
import json

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader

from diffcal.data.soft_label_dataset import SoftLabelDataset


def main() -> dict[str, float]:
    """Losses of the first and the last step."""
    parser = argparse.ArgumentParser(
        description="A timm network with timm's own augmentation and soft cross-entropy."
    )
    parser.add_argument("dataset", help="published data set folder")
    parser.add_argument("--model", default="resnet10t")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=32, help="side that images are resized to")
    args = parser.parse_args()

    torch.manual_seed(0)
    transform = timm.data.create_transform(
        (3, args.size, args.size), is_training=True, scale=(0.8, 1.0), hflip=0.0, color_jitter=None
    )
    data = SoftLabelDataset(
        args.dataset, transform=lambda image: transform(image.convert("RGB")), decode="pil"
    )
    loader = DataLoader(data, batch_size=32, shuffle=True)
    model = timm.create_model(args.model, pretrained=False, num_classes=len(data.class_names))
    optimizer = create_optimizer_v2(model, "sgd", lr=0.05, momentum=0.9)
    loss_of = SoftTargetCrossEntropy()

    losses: list[float] = []
    while len(losses) < args.steps:
        for image, soft_label in loader:
            loss = loss_of(model(image), soft_label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == args.steps:
                break
    return {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}


if __name__ == "__main__":
    print(json.dumps(main()))
