"""Which parameters are attributed, and where their gradients lie in the flattened vector."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from jaxtyping import Float
from torch import Tensor, nn

from diffcal.errors import ConfigError

__all__ = ["Layout", "select_parameters"]


@dataclass(frozen=True)
class Layout:
    """Names, shapes and offsets of named blocks in one flattened vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    size: int

    @staticmethod
    def of(shapes: Mapping[str, tuple[int, ...]]) -> "Layout":
        """Layout of blocks in the order of ``shapes``."""
        offsets, end = [], 0
        for shape in shapes.values():
            offsets.append(end)
            end += prod(shape)
        return Layout(tuple(shapes), tuple(shapes.values()), tuple(offsets), end)

    def __iter__(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        return iter(zip(self.names, self.shapes, self.offsets, strict=True))

    def split(self, vector: Float[Tensor, "b p"]) -> dict[str, Float[Tensor, "b *shape"]]:
        """Named blocks (views) of flattened rows."""
        return {
            name: vector[:, offset : offset + prod(shape)].unflatten(1, shape or (1,))
            for name, shape, offset in self
        }


def select_parameters(module: nn.Module, which: str = "all") -> dict[str, nn.Parameter]:
    """Trainable parameters chosen by ``which``, by name, in order of registration.

    ``which`` is a list of alternatives separated by ``,``. An alternative is

    - ``all``: every trainable parameter;
    - ``lora``: the adapters that peft puts into a model;
    - the name of a submodule (``mid_block``, ``up_blocks.1``), wherever it lies in the tree if the
      path from the root is left out (``attn1`` takes every ``...attn1...``);
    - ``re:PATTERN``: names in which the regular expression is found.

    Raises:
        ConfigError: an alternative that matches nothing (it is named), or a broken expression.
    """
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    chosen: set[str] = set()
    for alternative in _alternatives(which):
        found = {name for name in trainable if _matches(name, alternative)}
        if not found:
            raise ConfigError(
                f"no trainable parameter matches '{alternative}'; submodules: "
                f"{', '.join(name for name, _ in module.named_children()) or 'none'}"
            )
        chosen |= found
    return {name: parameter for name, parameter in trainable.items() if name in chosen}


def _alternatives(which: str) -> list[str]:
    if which.startswith("re:"):
        return [which]  # an expression may hold commas
    alternatives = [part.strip() for part in which.split(",") if part.strip()]
    if not alternatives:
        raise ConfigError("parameter filter is empty: use all, lora, submodules or re:PATTERN")
    return alternatives


def _matches(name: str, alternative: str) -> bool:
    if alternative == "all":
        return True
    if alternative == "lora":
        return bool(re.search(r"(^|\.)lora_", name))
    if alternative.startswith("re:"):
        try:
            return bool(re.search(alternative[3:], name))
        except re.error as error:
            raise ConfigError(f"'{alternative}' is not a regular expression: {error}") from error
    return f".{alternative}." in f".{name}."
