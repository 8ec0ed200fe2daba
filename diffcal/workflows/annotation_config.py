"""What to annotate a run with: annotator, encoder, real images."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffcal.config import check_choices
from diffcal.errors import ConfigError
from diffcal.mixing.annotators import build_annotator
from diffcal.mixing.encoding import EncoderConfig
from diffcal.workflows.feature_cache import FeatureDtype

__all__ = ["AnnotationConfig", "RealConfig"]


@dataclass(frozen=True, kw_only=True)
class RealConfig:
    """Real images that annotators are fitted on, and those on which they are calibrated."""

    name: str = "digits"
    """See :func:`diffcal.data.sources.open_images`. Its classes must be those of the model."""
    first_row: int = 0
    rows: int | None = None
    """Use rows ``first_row`` to ``first_row + rows``; all that follow if None."""
    image_column: str = "image"
    label_column: str = "label"
    held_out: float = 0.2
    """Share of these rows on which slopes and temperatures are set, drawn at random."""
    seed: int = 0
    """Of that draw."""
    held_out_name: str | None = None
    """Calibrate on images of this source (all of the above are then fitted on). Best are images that
    the encoder's training has not seen."""
    held_out_first_row: int = 0
    held_out_rows: int | None = None
    human: str | None = None
    """``.npy`` file with counts or shares of people's labels ``[n, k]``, one row for each row of the
    source of the held-out images: calibrates against people instead of hard labels."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigError(f"real.held_out must be a share in (0, 1), got {self.held_out}")


@dataclass(frozen=True, kw_only=True)
class AnnotationConfig:
    """Annotator, encoder and real images of one annotation of a run."""

    name: str = ""
    """Folder under ``annotations/``; the annotator's name if empty."""
    annotator: str = "kclass_posterior"
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the annotator, for instance ``{"slope": 2.3}`` of ``projection_sigmoid``."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    real: RealConfig = field(default_factory=RealConfig)
    nearest: bool = True
    """Search the nearest real image of each generated one."""
    batch_size: int = 256
    """Images per call of the encoder; changes features by rounding at most."""
    feature_dtype: FeatureDtype = "float32"
    """Of the cached features."""
    store_features: bool = False
    """Add the features to the annotation, as float16."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.name and (Path(self.name).name != self.name or self.name.startswith(".")):
            raise ConfigError(f"the annotation's name '{self.name}' must be a plain folder name")
        build_annotator(self.annotator, **self.settings)

    @property
    def folder(self) -> str:
        """Name of the annotation."""
        return self.name or self.annotator
