"""Real images paired with mixed ones, in a plain PyTorch loop.

    python examples/train_plain_pytorch.py runs/digits/dataset --real digits

Every step sees a batch of real images (cross-entropy) and, for each, one anchor and one intermediate of
a group that contains its class (squared error of the probabilities): the objective of Luo et al. 2025.
"""

import argparse
import json

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from diffcal.data.soft_label_dataset import PairedSoftLabelDataset
from diffcal.data.sources import open_images
from diffcal.models.registry import build_classifier


def main() -> dict[str, float]:
    """Losses of the first and the last step."""
    parser = argparse.ArgumentParser(
        description="Real images paired with mixed ones, in a plain PyTorch loop."
    )
    parser.add_argument("dataset", help="published data set folder")
    parser.add_argument("--real", default="digits", help="real images, as diffcal names them")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30, help="at most, in all epochs together")
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(0)
    pairs = PairedSoftLabelDataset(open_images(args.real), args.dataset)
    loader = DataLoader(pairs, batch_size=32, shuffle=True, num_workers=args.workers)
    channels, side, _ = pairs[0].image.shape
    model = build_classifier(
        "cnn-tiny", len(pairs.class_names), in_channels=channels, image_size=side
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    losses: list[float] = []
    for epoch in range(args.epochs):
        pairs.set_epoch(epoch)  # other companions in every epoch
        for image, label, mixed, soft_label in loader:
            real_loss = F.cross_entropy(model(image), label)
            probs = model(mixed.flatten(0, 1)).softmax(dim=1)
            mixed_loss = (probs - soft_label.flatten(0, 1)).square().sum(dim=1).mean()
            loss = real_loss + mixed_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == args.steps:
                break
        if len(losses) == args.steps:
            break
    return {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}


if __name__ == "__main__":
    print(json.dumps(main()))
