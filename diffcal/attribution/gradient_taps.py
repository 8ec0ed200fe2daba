"""Finds every use of chosen parameters in a forward pass and listens to the output's gradient.

The taps sit on operations, not on modules: a parameter is recognised by identity wherever it enters
``F.linear``, ``F.conv2d`` and so on, so that our own layers, raw parameters, tied weights and modules
that are called several times need no case of their own. An operation without a rule is reported by
name with the parameters that it took.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from diffcal.attribution.gradient_parts import Part

__all__ = ["Alias", "RULES", "Taps", "UnsupportedUse", "rule"]


class UnsupportedUse(Exception):
    """A rule met arguments that it is not made for; the parameter is handed to another method."""


@dataclass(frozen=True)
class Alias:
    """A tensor with the elements of a parameter in the parameter's order."""

    name: str
    shape: tuple[int, ...]
    tensor: Tensor

    @property
    def keeps_rows(self) -> bool:
        """Whether the first axis is the parameter's, so that its factorised sketch applies."""
        return bool(self.shape) and self.tensor.shape[:1] == self.shape[:1]


Rule = Callable[["Taps", tuple[Any, ...], dict[str, Any]], tuple[Tensor, list[Part]]]
"""From the arguments of an operation to its output and the parts of its parameters."""

RULES: dict[Any, Rule] = {}
"""Operation -> rule; :func:`rule` fills it."""


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Decorator: the rule of these operations."""

    def register(function: Rule) -> Rule:
        RULES.update((operation, function) for operation in functions)
        return function

    return register


_SAME_ELEMENTS = {
    torch.Tensor.to,
    torch.Tensor.type,
    torch.Tensor.type_as,
    torch.Tensor.float,
    torch.Tensor.double,
    torch.Tensor.half,
    torch.Tensor.bfloat16,
    torch.Tensor.clone,
    torch.Tensor.contiguous,
    torch.Tensor.reshape,
    torch.Tensor.view,
    torch.Tensor.flatten,
    torch.Tensor.unsqueeze,
    torch.Tensor.squeeze,
    torch.reshape,
    torch.flatten,
    torch.unsqueeze,
    torch.squeeze,
    torch.clone,
}
_WITHOUT_GRADIENT = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]


class Taps(TorchFunctionMode):
    """While active, every use of a parameter is turned into parts and its output is listened to.

    Args:
        parameters: What to look for. None of them may require gradients: no weight gradient is
            computed, and the graph begins at the first output that depends on them.
        rows: Rows of the batch.
        entries: Entries of all rows together, a multiple of the rows.
        listen: Called in the backward pass with the parts of one operation and the gradient of its
            output.
        prepare: Called in the forward pass with every part.

    Attributes:
        uses: Parts found so far, by parameter.
        unsupported: Names of parameters that met an operation without a rule, and that operation.
        leaves: Tensors to differentiate with respect to, so that every tap hears.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rows: int,
        entries: int,
        listen: Callable[[list[Part], Tensor], None],
        prepare: Callable[[Part], None],
    ) -> None:
        super().__init__()
        self.rows, self.entries = rows, entries
        self._listen, self._prepare = listen, prepare
        # The aliases hold their tensors, so that no id is used twice while this lives.
        self._aliases = {
            id(parameter): Alias(name, tuple(parameter.shape), parameter)
            for name, parameter in parameters.items()
        }
        self.uses: dict[str, int] = {}
        self.unsupported: dict[str, str] = {}
        self.leaves: list[Tensor] = []

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        found = [self._aliases[key] for key in _ids(args, kwargs) if key in self._aliases]
        if not found:
            if func is F.scaled_dot_product_attention:
                return _attention(*args, **kwargs)
            return func(*args, **kwargs)
        operation = RULES.get(func)
        if operation is not None:
            try:
                output, parts = operation(self, args, kwargs)
            except UnsupportedUse:
                pass
            else:
                return self._tap(output, parts)
        result = func(*args, **kwargs)
        if func in _SAME_ELEMENTS and self.alias(args[0]) is found[0] and len(found) == 1:
            first = found[0]
            self._aliases[id(result)] = Alias(first.name, first.shape, result)
        elif func not in _WITHOUT_GRADIENT and any(_tensors(result)) and torch.is_grad_enabled():
            for alias in found:
                self.unsupported.setdefault(alias.name, resolve_name(func) or repr(func))
        return result

    def alias(self, tensor: Any) -> Alias | None:
        """The parameter that a tensor stands for, or None."""
        return self._aliases.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def activation(self, tensor: Any) -> Tensor:
        """An operand that is no parameter, with m entries for each row.

        What is the same for all rows (a single noise level) is repeated, so that its output has a
        gradient for each row.

        Raises:
            UnsupportedUse: a parameter, or a first axis that is no multiple of the rows.
        """
        if not isinstance(tensor, Tensor) or tensor.ndim == 0 or self.alias(tensor) is not None:
            raise UnsupportedUse
        if len(tensor) == 1 and self.rows > 1:
            return tensor.expand(self.entries, *tensor.shape[1:])
        if len(tensor) == 0 or len(tensor) % self.rows:
            raise UnsupportedUse
        return tensor

    def _tap(self, output: Tensor, parts: list[Part]) -> Tensor:
        if not parts or not torch.is_grad_enabled():
            return output
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            for part in parts:
                self.uses[part.name] = self.uses.get(part.name, 0) + 1
                self._prepare(part)
        if not output.requires_grad:
            leaf = output.detach().requires_grad_()
            self.leaves.append(leaf)
            # A leaf must not be changed in place, and what follows may do so.
            tapped, output = leaf, leaf.clone()
        else:
            tapped = output
        tapped.register_hook(functools.partial(_hear, self._listen, parts))
        return output


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Torch's own, on a CPU in float32: its backward pass takes four times as long in bfloat16."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        wide = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), *args, **kwargs
        )
    return wide.to(query.dtype)


def _hear(listen: Callable[[list[Part], Tensor], None], parts: list[Part], g: Tensor) -> None:
    with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
        listen(parts, g.detach())
    parts.clear()  # frees the activations while the backward pass goes on


def _ids(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Iterable[int]:
    for value in args:
        if isinstance(value, Tensor):
            yield id(value)
        elif isinstance(value, list | tuple):
            yield from _ids(value, {})
    for value in kwargs.values():
        if isinstance(value, Tensor):
            yield id(value)
        elif isinstance(value, list | tuple):
            yield from _ids(value, {})


def _tensors(value: Any) -> Iterable[bool]:
    if isinstance(value, Tensor):
        yield value.is_floating_point()
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
