"""What to mix: for every group its classes, the weights of its members, and its seed.

A plan is a pure function of (settings, seed, group): nothing is stored, and any group can be asked
for alone, in any order, on any machine. Only a bisection looks at images to find its weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.core.rng import item_generator, item_seed
from diffcal.errors import ConfigError
from diffcal.mixing.seed_list import parse_seed_list
from diffcal.mixing.weights import lambda_grid

__all__ = [
    "MixGroup",
    "MixPlan",
    "PlanConfig",
    "combination",
    "pair_probabilities",
]

Choice = Literal["cycle", "uniform", "confusable"]
WeightKind = Literal["grid", "bisect", "dirichlet"]


@dataclass(frozen=True)
class MixGroup:
    """Images that start from one noise and differ in their weights alone."""

    index: int
    classes: tuple[int, ...]
    """The k classes that are mixed, in ascending order."""
    weights: Float[Tensor, "m k"]
    """One row for each member, over ``classes``; float32, non-negative, sum 1. Of a bisection that has
    not been made yet the three rows that it starts from."""
    seed: int
    """Seed of the initial noise."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Groups, members, and how classes and weights are chosen.

    The defaults are those of the CSM release: all pairs in turn, eight equally spaced ratios.
    """

    groups: int = 450
    members: int = 8
    """Images in a group, pure classes included."""
    classes_per_mix: int = 2
    weights: WeightKind = "grid"
    """``grid``: lambda in equal steps from 0 to 1 (pairs only). ``bisect``: lambda where the images
    change (pairs only): 0, 1/2 and 1, then one after the other in the middle of the two neighbours
    whose images differ most, see :mod:`~diffcal.mixing.bisection`; of two members the ends.
    ``dirichlet``: the k pure classes, the other members drawn from a Dirichlet distribution (for a
    pair: a Beta distribution)."""
    spare: int = 4
    """Of the bisection: images of a group that are drawn to find where the images change and not
    kept, so that the others lie evenly; they cost as much as the others."""
    grid_power: float = 1.0
    """Of the grid: lambda is ``(1 + sign(u) |u|^power) / 2`` for u in equal steps from -1 to 1. 1 is
    the release; above 1 the grid is denser in the middle, where images pass from class to class."""
    concentration: float = 1.0
    """Of the Dirichlet distribution; 1 is uniform, larger values crowd the middle."""
    choice: Choice = "cycle"
    """``cycle``: all combinations of classes, in lexicographic order, again and again. ``uniform``:
    drawn at random. ``confusable``: pairs drawn in proportion to how often they are confused."""
    confusion: tuple[tuple[float, ...], ...] = ()
    """Choice confusable: how strongly class i (row) is taken for class j, for instance the counts
    of a validation confusion matrix; the diagonal is ignored."""
    uniform_share: float = 0.5
    """Choice confusable: share of groups whose pair is drawn uniformly all the same."""
    seeds: str | None = None
    """Seeds of the groups' noise in the notation of EDM's and CSM's published commands, such as
    ``"0-449"`` or ``"d8,0-449"`` (each seed once for a group, or once for every member), instead of
    seeds drawn from the seed of the run: with the release's other settings its own starting noise."""
    only: tuple[tuple[str, ...], ...] = ()
    """Mix these combinations alone, given by class name; all combinations if empty."""

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ConfigError(f"plan.groups must be at least 1, got {self.groups}")
        if self.classes_per_mix < 2:
            raise ConfigError(
                f"plan.classes_per_mix must be at least 2, got {self.classes_per_mix}"
            )
        if self.members < self.classes_per_mix:
            raise ConfigError(
                f"plan.members {self.members} leaves no room for the {self.classes_per_mix} pure "
                "classes"
            )
        if self.weights not in get_args(WeightKind) or self.choice not in get_args(Choice):
            raise ConfigError(
                f"plan: weights is one of {', '.join(get_args(WeightKind))} and choice one of "
                f"{', '.join(get_args(Choice))}; got '{self.weights}' and '{self.choice}'"
            )
        if self.weights != "dirichlet" and self.classes_per_mix != 2:
            raise ConfigError(
                f"plan.weights {self.weights} runs between two classes; use weights dirichlet for "
                f"{self.classes_per_mix}"
            )
        if self.spare < 0:
            raise ConfigError(f"plan.spare must not be negative, got {self.spare}")
        if not (self.grid_power > 0 and math.isfinite(self.grid_power)):
            raise ConfigError(f"plan.grid_power must be positive, got {self.grid_power}")
        if not (self.concentration > 0 and math.isfinite(self.concentration)):
            raise ConfigError(f"plan.concentration must be positive, got {self.concentration}")
        if not 0 <= self.uniform_share <= 1:
            raise ConfigError(f"plan.uniform_share must be in [0, 1], got {self.uniform_share}")
        if self.choice == "confusable" and (self.classes_per_mix != 2 or not self.confusion):
            raise ConfigError("plan.choice confusable needs pairs and plan.confusion, a matrix")
        if self.only and self.choice == "confusable":
            raise ConfigError("plan.only lists the combinations, so choice confusable has no say")
        if self.seeds is not None:
            self.group_seeds()

    @property
    def drawn_per_image(self) -> float | int:
        """Images that are drawn for each that is kept."""
        return 1 + self.spare / self.members if self.bisects else 1

    @property
    def bisects(self) -> bool:
        """Whether there is anything for a bisection to place."""
        return self.weights == "bisect" and self.members > 2

    def group_seeds(self) -> list[int]:
        """The seed that ``seeds`` gives each group; ConfigError if their number does not fit."""
        listed = parse_seed_list(self.seeds or "")
        if len(listed) == self.groups:
            return listed
        seeds = listed[:: self.members]
        if len(listed) != self.groups * self.members or listed != [
            seed for seed in seeds for _ in range(self.members)
        ]:
            raise ConfigError(
                f"plan.seeds '{self.seeds}' lists {len(listed)} seeds for {self.groups} groups of "
                f"{self.members} members; give one for each group, or each {self.members} times"
            )
        return seeds


class MixPlan:
    """The groups of a run.

    Args:
        config: See :class:`PlanConfig`.
        class_names: Of the denoiser, in its order.
        seed: Of the run.
        found: Weights of groups that a bisection found before, so that their images can be drawn
            again without it.

    Raises:
        ConfigError: too few classes, unknown names in ``only``, or a confusion matrix of another size.
    """

    def __init__(
        self,
        config: PlanConfig,
        class_names: tuple[str, ...],
        seed: int = 0,
        *,
        found: Mapping[int, Float[Tensor, "m k"]] | None = None,
    ) -> None:
        self.config, self.class_names, self.seed = config, tuple(class_names), seed
        self.found = found
        if len(class_names) < config.classes_per_mix:
            raise ConfigError(
                f"cannot mix {config.classes_per_mix} classes of {len(class_names)} "
                f"({', '.join(class_names)})"
            )
        self._listed = tuple(self._by_name(names) for names in config.only)
        if config.choice == "confusable":
            matrix = torch.tensor(config.confusion, dtype=torch.float64)
            if matrix.shape != (len(class_names), len(class_names)):
                raise ConfigError(
                    f"plan.confusion is {'x'.join(map(str, matrix.shape))} for "
                    f"{len(class_names)} classes"
                )
            self._pair_cdf = pair_probabilities(matrix, config.uniform_share).cumsum(0)
        self._seeds = None if config.seeds is None else config.group_seeds()

    def __len__(self) -> int:
        return self.config.groups

    def __getitem__(self, group: int) -> MixGroup:
        """Group ``group``, counted from 0; IndexError beyond the last."""
        if not 0 <= group < len(self):
            raise IndexError(f"group {group} of {len(self)}")
        seed = item_seed(self.seed, "latent", group) if self._seeds is None else self._seeds[group]
        return MixGroup(group, self._classes(group), self._weights(group), seed)

    @property
    def bisects(self) -> bool:
        """Whether the weights are found while the images are drawn."""
        return self.config.bisects and self.found is None

    @cached_property
    def combinations(self) -> int:
        """How many combinations of classes can come up."""
        return len(self._listed) or math.comb(len(self.class_names), self.config.classes_per_mix)

    def _classes(self, group: int) -> tuple[int, ...]:
        if self.config.choice == "cycle":
            rank = group % self.combinations
        else:
            generator = item_generator(self.seed, "classes", group)
            draw = torch.rand((), generator=generator, dtype=torch.float64)
            if self.config.choice == "confusable":
                rank = int(
                    torch.searchsorted(self._pair_cdf, draw * self._pair_cdf[-1], right=True)
                )
            else:
                rank = int(draw * self.combinations)
            rank = min(rank, self.combinations - 1)
        if self._listed:
            return self._listed[rank]
        return combination(rank, len(self.class_names), self.config.classes_per_mix)

    def _weights(self, group: int) -> Float[Tensor, "m k"]:
        config = self.config
        if self.found is not None:
            return self.found[group]
        if config.weights != "dirichlet":
            lambdas = (
                lambda_grid(3) if config.bisects else lambda_grid(config.members, config.grid_power)
            )
            return torch.stack([lambdas, 1 - lambdas], dim=1)
        k, free = config.classes_per_mix, config.members - config.classes_per_mix
        generator = item_generator(self.seed, "weights", group)
        shape = torch.full((free, k), config.concentration, dtype=torch.float64)
        draws = torch._standard_gamma(shape, generator=generator)  # type: ignore[attr-defined]
        draws = draws.clamp(min=1e-30)
        mixed = draws / draws.sum(dim=1, keepdim=True)
        rows = torch.cat([torch.eye(k, dtype=torch.float64), mixed])
        return rows[rows[:, 0].argsort(stable=True)].float()

    def _by_name(self, names: tuple[str, ...]) -> tuple[int, ...]:
        if len(set(names)) != self.config.classes_per_mix or len(set(names)) != len(names):
            raise ConfigError(
                f"plan.only: ({', '.join(names)}) are not {self.config.classes_per_mix} different "
                "classes"
            )
        for name in names:
            if name not in self.class_names:
                raise ConfigError(
                    f"plan.only: unknown class '{name}'; the model has "
                    f"{', '.join(self.class_names[:20])}"
                )
        return tuple(sorted(self.class_names.index(name) for name in names))


def combination(rank: int, n: int, k: int) -> tuple[int, ...]:
    """The ``rank``-th of the ``k``-element subsets of 0..n-1 in lexicographic order.

    Raises:
        ConfigError: there are not that many.
    """
    if not 0 <= rank < math.comb(n, k):
        raise ConfigError(f"rank {rank} of {math.comb(n, k)} combinations")
    chosen: list[int] = []
    element = 0
    while len(chosen) < k:
        # Subsets that continue with ``element``; skip them all if the rank lies behind.
        count = math.comb(n - element - 1, k - len(chosen) - 1)
        if rank < count:
            chosen.append(element)
        else:
            rank -= count
        element += 1
    return tuple(chosen)


def pair_probabilities(
    confusion: Float[Tensor, "k k"], uniform_share: float
) -> Float[Tensor, " pairs"]:
    """Probability of each pair i < j in lexicographic order, float64.

    ``uniform_share / pairs + (1 - uniform_share) * C_ij / sum(C)`` with ``C`` the symmetric part of
    the off-diagonal confusion. On CIFAR-10, people's second choices fall on 5 of 45 pairs in 56 % of
    the cases, which equal treatment of pairs ignores.

    Raises:
        ConfigError: negative, non-finite or all-zero confusion.
    """
    c = confusion.double()
    first, second = torch.triu_indices(len(c), len(c), offset=1)
    pairs = (c[first, second] + c[second, first]) / 2
    if not bool((pairs >= 0).all() and pairs.isfinite().all()) or float(pairs.sum()) <= 0:
        raise ConfigError("confusion must be finite, non-negative, and positive for some pair")
    return uniform_share / len(pairs) + (1 - uniform_share) * pairs / pairs.sum()
