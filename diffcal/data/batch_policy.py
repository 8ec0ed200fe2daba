"""Which images meet in a training batch, decided by (seed, epoch, step) alone."""

import functools
import logging
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffcal.core.rng import item_generator
from diffcal.errors import DataError

__all__ = ["MixedGroups", "epoch_order", "uniform_rows"]

logger = logging.getLogger(__name__)


def epoch_order(seed: int, count: int, epoch: int) -> Int[Tensor, " n"]:
    """Order in which an epoch visits ``count`` real images (shared: do not write into it)."""
    return _permutation(seed, "classifier-order", count, epoch)


def uniform_rows(seed: int, count: int, batch: int, step: int) -> Int[Tensor, " b"]:
    """Mixed images of a step without regard to the real ones: permutation after permutation."""
    start, rows = step * batch, []
    while batch > 0:
        turn, offset = divmod(start, count)
        order = _permutation(seed, "classifier-mixed-order", count, turn)
        rows.append(order[offset : offset + batch])
        start, batch = start + len(rows[-1]), batch - len(rows[-1])
    return torch.cat(rows)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, stream: str, count: int, turn: int) -> Tensor:
    # a step reads a slice of it; drawing it anew each step would cost milliseconds
    return torch.randperm(count, generator=item_generator(seed, stream, turn))


@dataclass(frozen=True)
class MixedGroups:
    """Groups of mixed images (one noise, several weightings) indexed for drawing by class.

    Built by :meth:`build`; all tensors are on the CPU.
    """

    members: Int[Tensor, "g m"]
    """Row of each member; -1 beyond the group's size."""
    anchors: Int[Tensor, "g k"]
    """Row of the member with the largest soft label of class k; -1 if k is not in the group."""
    middle: Bool[Tensor, "g m"]
    """Members that are no class's anchor; all of them in a group of anchors only."""
    class_groups: Int[Tensor, " e"]
    """Groups of class 0, then of class 1, and so on."""
    class_starts: Int[Tensor, " k1"]
    """Where each class begins in ``class_groups``; the last entry is its length."""

    @classmethod
    def build(
        cls,
        targets: Float[Tensor, "n k"],
        groups: Int[Tensor, " n"],
        support: Bool[Tensor, "n k"] | None = None,
    ) -> "MixedGroups":
        """Index rows of soft labels by group and class.

        Args:
            targets: Soft label of each mixed image.
            groups: Group of each, in any order.
            support: Classes that each image was mixed from; by default a group's classes are the
                likeliest classes of its members.

        Raises:
            DataError: no mixed images.
        """
        if len(targets) == 0:
            raise DataError("there are no mixed images to train on")
        num_classes = targets.shape[1]
        order = torch.argsort(groups, stable=True)
        _, sizes = torch.unique_consecutive(groups[order], return_counts=True)
        members = torch.full((len(sizes), int(sizes.max())), -1)
        valid = torch.arange(members.shape[1]) < sizes[:, None]
        members[valid] = order
        if support is None:
            likeliest = targets.argmax(dim=1, keepdim=True)
            support = torch.zeros_like(targets, dtype=torch.bool).scatter_(1, likeliest, True)
        inside = (support[members] & valid[:, :, None]).any(dim=1)
        scores = targets[members].masked_fill(~valid[:, :, None], -1.0)
        top = scores.argmax(dim=1)
        anchors = members.gather(1, top).masked_fill(~inside, -1)
        is_anchor = torch.zeros_like(members, dtype=torch.bool)
        group_of, class_of = inside.nonzero(as_tuple=True)
        is_anchor[group_of, top[group_of, class_of]] = True
        middle = valid & ~is_anchor
        middle = torch.where(middle.any(dim=1, keepdim=True), middle, valid)
        by_class = torch.argsort(class_of, stable=True)
        counts = torch.bincount(class_of, minlength=num_classes)
        if bool((counts == 0).any()):
            missing = (counts == 0).nonzero()[:, 0].tolist()
            logger.warning(
                "no mixed group contains %s %s; their real images get members of any group",
                "classes" if len(missing) > 1 else "class",
                ", ".join(map(str, missing)),
            )
        return cls(
            members=members,
            anchors=anchors,
            middle=middle,
            class_groups=group_of[by_class],
            class_starts=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        )

    def draw(
        self,
        labels: Int[Tensor, " b"],
        per_real: int,
        anchor_fraction: float,
        generator: torch.Generator,
    ) -> Int[Tensor, "b r"]:
        """Rows of ``per_real`` mixed images for each real image of class ``labels``.

        For each real image a group that contains its class is drawn uniformly. The first
        ``per_real * anchor_fraction`` images are anchors (a fractional part is one more with that
        chance; each further anchor comes from a group of its own); the others are distinct
        middle members of the first group, repeated only when it has too few.
        """
        count = len(labels)
        anchors = self._anchor_counts(count, per_real, anchor_fraction, generator)
        first = self._groups(labels, generator)
        shuffled = torch.rand(count, self.members.shape[1], generator=generator)
        middle = self.middle[first]
        middle_order = shuffled.masked_fill(~middle, 2.0).argsort(dim=1)
        middle_count = middle.sum(dim=1)
        rows = torch.empty(count, per_real, dtype=torch.int64)
        for slot in range(per_real):
            group = first if slot == 0 else self._groups(labels, generator)
            anchor = self._anchor_of(group, labels, generator)
            place = (slot - anchors).clamp(min=0) % middle_count
            position = middle_order.gather(1, place[:, None])
            between = self.members[first].gather(1, position)[:, 0]
            rows[:, slot] = torch.where(slot < anchors, anchor, between)
        return rows

    def _groups(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        start, end = self.class_starts[labels], self.class_starts[labels + 1]
        chance = torch.rand(len(labels), generator=generator, dtype=torch.float64)
        known = end > start
        index = start + (chance * (end - start)).long()
        anywhere = (chance * len(self.members)).long()
        # a class without groups takes any; build() has said so
        return torch.where(known, self.class_groups[torch.where(known, index, 0)], anywhere)

    def _anchor_of(self, group: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        anchor = self.anchors[group, labels]
        sizes = (self.members[group] >= 0).sum(dim=1)
        chance = torch.rand(len(labels), generator=generator, dtype=torch.float64)
        some = self.members[group, (chance * sizes).long()]
        return torch.where(anchor >= 0, anchor, some)

    @staticmethod
    def _anchor_counts(
        count: int, per_real: int, anchor_fraction: float, generator: torch.Generator
    ) -> Tensor:
        wanted = per_real * anchor_fraction
        chance = torch.rand(count, generator=generator, dtype=torch.float64)
        # 0.5 * 2 must be one anchor for every image, whatever the rounding
        whole = round(wanted) if abs(wanted - round(wanted)) < 1e-9 else int(wanted)
        extra = max(wanted - whole, 0.0) if abs(wanted - whole) >= 1e-9 else 0.0
        return whole + (chance < extra).long()
