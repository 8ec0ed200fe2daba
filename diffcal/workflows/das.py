"""Diffusion attribution scores, from a model and its training images to an explained gallery.

    from diffcal.workflows import das

    das.index(das.das_config("digits"), "runs/das")             # features of all training images
    das.score("runs/das", "runs/csm/generated", top=20)         # tables and gallery.html
    das.explain("runs/das/scores", ["17"], out="17.html")       # one query more closely

Stages, each an artefact that the next one reads:

1. index: for each training image, at several timesteps, what the output layer sees of it or the
   gradient of a functional of the model's output (das.md, sections 2 and 4), projected, and the kernel
   of all of them;
2. score: the same features of the queries, and ``(ψᵀ (K + λI)⁻¹ φ)²`` against every training image;
3. explain: the images themselves beside each other;
4. lds: does it hold? Models trained on random halves of the data say (``diffcal das lds``);
5. counterfactual: retrain without the images on top, draw the query again, and compare.

Source: Lin et al. 2025, "Diffusion Attribution Score" (arXiv:2410.18639). The default deviates: all
outputs at once with respect to the output layer, one noise shared by all images, timesteps side by
side, a sparse sketch, a damping in units of the kernel; ``das_config("das-official")`` has the
published settings, ``dtrak`` and ``trak`` the methods it is compared with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffcal.attribution.functionals import NamedFunctional, Outputs
from diffcal.attribution.score_config import ScoreConfig
from diffcal.config import build_config
from diffcal.diffusion.denoisers import Denoiser
from diffcal.workflows.das_config import INDEX_METHODS, METHODS, DasConfig, das_config
from diffcal.workflows.das_counterfactual import run_counterfactual
from diffcal.workflows.das_counterfactual_config import (
    CounterfactualConfig,
    counterfactual_config,
)
from diffcal.workflows.das_index import AttributionIndex, build_index, read_manifest_of_index
from diffcal.workflows.das_lds import run_lds
from diffcal.workflows.das_lds_config import LdsConfig
from diffcal.workflows.das_report import explain_scores
from diffcal.workflows.das_score import HeldOut, QueryConfig, ScoreRunConfig, score_queries
from diffcal.workflows.preset_files import preset_config

__all__ = [
    "INDEX_METHODS",
    "METHODS",
    "AttributionIndex",
    "CounterfactualConfig",
    "DasConfig",
    "HeldOut",
    "LdsConfig",
    "NamedFunctional",
    "Outputs",
    "counterfactual",
    "counterfactual_config",
    "das_config",
    "explain",
    "index",
    "lds",
    "lds_config",
    "score",
    "score_config",
]


def index(
    config: DasConfig,
    out: Path | str,
    *,
    denoiser: Denoiser | None = None,
    functional: NamedFunctional | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Features and kernel of all training images; see :func:`~.das_index.build_index`.

    Args:
        functional: Your own functional or loss, which sees the network's output and its target::

            huber = das.NamedFunctional(
                "huber/1",
                lambda o: F.huber_loss(o.prediction, o.target, reduction="none").flatten(1).mean(1),
            )
            das.index(config, "runs/das", functional=huber)
            das.score("runs/das", "queries", functional=huber)

            Its name stands for it in the index, which refuses one of another name.
    """
    return build_index(
        config,
        Path(out),
        denoiser=denoiser,
        functional=functional,
        device=device,
        overwrite=overwrite,
    )


def score(
    index: Path | str,
    queries: Path | str,
    out: Path | str | None = None,
    *,
    top: int = 20,
    rows: int | None = None,
    scores: ScoreConfig | None = None,
    held_out: Path | str | None = None,
    groups: Sequence[str] = (),
    royalties: float | None = None,
    without: Sequence[int] = (),
    denoiser: Denoiser | None = None,
    functional: NamedFunctional | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Scores of queries against all training images; see :func:`~.das_score.score_queries`.

    Args:
        queries: A run of ``diffcal csm``, any labelled images, or image files.
        rows: Only the first so many.
        scores: Other scores of the same features than the index's own.
        held_out: Real images that the model was not trained on, which tell what is no copy; ``rest``:
            those of the training source.
        groups: Columns of the training images by which attribution is shared out, besides the class.
        royalties: An amount to divide among the groups.
        without: Ids of training images to leave out, as if the index did not hold them.
        functional: Your own functional, if the index was made with one.
    """
    config = ScoreRunConfig(
        queries=QueryConfig(name=str(queries), rows=rows),
        scores=scores,
        top=top,
        held_out=None if held_out is None else HeldOut(name=str(held_out)),
        groups=tuple(groups),
        royalties=royalties,
        without=tuple(without),
    )
    return score_queries(
        Path(index),
        config,
        None if out is None else Path(out),
        denoiser=denoiser,
        functional=functional,
        device=device,
        overwrite=overwrite,
    )


def explain(
    scores: Path | str,
    queries: Sequence[str] = (),
    *,
    top: int = 10,
    out: Path | str | None = None,
    groups: Sequence[str] = (),
    royalties: float | None = None,
) -> dict[str, Any]:
    """A page of queries with the images behind them; see :func:`~.das_report.explain_scores`."""
    return explain_scores(
        Path(scores),
        queries,
        top=top,
        out=None if out is None else Path(out),
        groups=groups,
        royalties=royalties,
    )


def lds(
    config: LdsConfig, out: Path | str, *, device: str = "auto", overwrite: bool = False
) -> dict[str, Any]:
    """Whether scores predict retraining; see :func:`~.das_lds.run_lds`."""
    return run_lds(config, Path(out), device=device, overwrite=overwrite)


def lds_config(
    preset: str | None = None, overrides: Sequence[str] = (), *, file: Path | None = None
) -> LdsConfig:
    """Settings of an LDS from a preset (``digits``), then a TOML file, then overrides.

    Raises:
        ConfigError: unknown preset or setting.
    """
    return preset_config(LdsConfig, "lds", preset, overrides, file=file)


def counterfactual(
    config: CounterfactualConfig,
    out: Path | str,
    *,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """What retraining without the top images changes; see :mod:`~.das_counterfactual`."""
    return run_counterfactual(config, Path(out), device=device, overwrite=overwrite)


def score_config(
    index: Path, queries: str, overrides: Sequence[str] = (), *, file: Path | None = None
) -> ScoreRunConfig:
    """Settings of a scoring: the index's scores, then a TOML file, then overrides.

    Raises:
        ArtifactError: no finished index.
        ConfigError: unknown or wrong settings.
    """
    base = {
        "queries": {"name": queries},
        "scores": read_manifest_of_index(index)["config"]["scores"],
    }
    return build_config(ScoreRunConfig, file, overrides, base)
