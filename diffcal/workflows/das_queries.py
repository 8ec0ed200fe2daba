"""Which images to explain, and which images tell what is no copy."""

from dataclasses import dataclass
from typing import Literal

from diffcal.config import check_choices
from diffcal.errors import ConfigError

__all__ = ["REST", "HeldOut", "QueryConfig"]

REST = "rest"
"""The rows of the training source that were not trained on."""


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """Which images to explain; see :func:`~diffcal.workflows.das_images.open_queries`."""

    name: str = ""
    first_row: int = 0
    rows: int | None = None
    stride: int = 1
    """Take every so many rows."""
    unconditional: bool = False
    """Take gradients through the branch without a class."""
    image_column: str = "image"
    label_column: str = "label"
    features: Literal["auto", "images", "sampling-path"] = "auto"
    """Gradients at the images themselves, or at the predicted clean images of every sampling step
    (Journey-TRAK), for images of ``diffcal csm``, which can be drawn again; auto: as the index's
    method has it."""

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Real images that the model was not trained on: what likeness and dominance they show is chance."""

    name: str = REST
    """As for queries, or ``rest``: the rows of the training source that were not trained on."""
    first_row: int = 0
    rows: int | None = None
    unconditional: bool = False
    image_column: str = "image"
    label_column: str = "label"
    quantile: float = 0.99
    """A query is flagged beyond this quantile of the held-out images, so that about
    ``1 - quantile`` of harmless queries are flagged as well."""

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ConfigError(f"held_out.quantile must lie between 0 and 1, got {self.quantile}")
