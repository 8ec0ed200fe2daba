"""Bootstrap resamples of examples, vectorised, and intervals from them.

Up to :data:`EXACT_ROWS` examples every resample draws the examples themselves. Above that, examples
of nearly equal confidence and outcome are joined to atoms (4,096 confidence cells, outcomes apart),
and resamples draw how often each atom occurs: the same distribution except that confidences are
rounded within a cell. Bins stay those of the data.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import norm as normal
from torch import Tensor

from diffcal.calibration.metrics.binning import assign_width
from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.calibration.metrics.profile import Profile, segment_sums
from diffcal.errors import ConfigError

__all__ = [
    "EXACT_ROWS",
    "Interval",
    "IntervalMethod",
    "interval_from_draws",
    "resample_classwise",
    "resample_means",
    "resample_predictions",
    "resample_profile",
    "resample_statistics",
]

EXACT_ROWS = 8192
CELLS = 4096
LEVELS = 8  # classes of outcomes inside a cell; hard outcomes fall into the first and the last
CHUNK_ELEMENTS = 1 << 19  # resamples are processed so many entries at a time: 4 MiB

IntervalMethod = Literal["basic", "percentile", "bc"]


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval."""

    value: float
    low: float
    high: float
    level: float
    n_resamples: int
    method: str


def interval_from_draws(
    value: float,
    draws: Float[Tensor, " r"],
    level: float = 0.95,
    method: IntervalMethod = "basic",
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Interval of ``value`` from bootstrap ``draws``, clipped to ``bounds``, always holding ``value``.

    ``percentile`` takes quantiles of the draws. Errors that are sums of absolute gaps grow under
    resampling (a resampled ECE exceeds the ECE), so that percentiles are biased upward; ``basic``
    mirrors them at the value, which removes the bias once, and is the default. ``bc`` shifts the
    quantiles by the normal score of the share of draws below the value. NaN draws are left out.

    Nominal 95 % intervals of ECE_15 covered the true value in 200 simulated data sets each (four
    classes; basic / percentile / bc): true ECE 0 with N = 500 0.51 / 0.00 / 0.00, with N = 5,000 0.56
    / 0.00 / 0.00; true ECE 0.024: 0.90 / 0.00 / 0.04 and 0.88 / 0.74 / 0.84; true ECE 0.11: 0.91 /
    0.93 / 0.94 and 0.92 / 0.95 / 0.95. So close to perfect calibration no bootstrap interval keeps
    its promise; compare the value with the noise floor there.

    Source: Efron and Tibshirani 1993, chapters 13 and 14; Davison and Hinkley 1997, section 5.2.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level must lie strictly between 0 and 1, got {level}")
    sample = draws[draws.isfinite()].cpu().numpy()
    if len(sample) == 0 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan, level, len(draws), method)
    tail = (1 - level) / 2
    if method == "percentile":
        low, high = np.quantile(sample, [tail, 1 - tail])
    elif method == "basic":
        upper, lower = np.quantile(sample, [1 - tail, tail])
        low, high = 2 * value - upper, 2 * value - lower
    elif method == "bc":
        below = np.clip((sample < value).mean(), 0.5 / len(sample), 1 - 0.5 / len(sample))
        shift = 2 * normal.ppf(below)
        low, high = np.quantile(sample, normal.cdf(shift + normal.ppf([tail, 1 - tail])))
    else:
        raise ConfigError(f"unknown interval method '{method}': use basic, percentile or bc")
    low, high = min(max(float(low), bounds[0]), value), max(min(float(high), bounds[1]), value)
    return Interval(value, low, high, level, len(draws), method)


def resample_statistics(
    scores: Confidences,
    statistics: Mapping[str, Callable[[Profile], Float[Tensor, "*r"]]],
    n_resamples: int,
    seed: int,
) -> dict[str, Float[Tensor, " r"]]:
    """Each statistic of the same ``n_resamples`` bootstrap resamples of confidences with outcomes.

    A statistic takes a profile with a leading axis. Where atoms stand for the examples, its draws
    are shifted by what joining changed in the statistic of the data.

    Raises:
        ConfigError: ``n_resamples`` below 1.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in statistics}
    for profile in _profiles(scores, n_resamples, seed):
        for name, statistic in statistics.items():
            parts[name].append(statistic(profile))
    draws = {name: torch.cat(part) for name, part in parts.items()}
    if len(scores) > EXACT_ROWS:
        c, t, count = _atoms(scores)
        joined = _profile(c, count, t * count)
        for name, statistic in statistics.items():
            draws[name] += statistic(scores.profile) - statistic(joined)
    return draws


def resample_profile(scores: Confidences, n_resamples: int, seed: int) -> Profile:
    """Resamples as one profile with a leading axis of ``n_resamples``."""
    parts = list(_profiles(scores, n_resamples, seed))
    return Profile(
        parts[0].confidence,
        torch.cat([part.count for part in parts]),
        torch.cat([part.hits for part in parts]),
    )


def resample_means(values: Float[Tensor, " n"], n_resamples: int, seed: int) -> Float[Tensor, " r"]:
    """Means of bootstrap resamples of ``values``.

    Above :data:`EXACT_ROWS` values, sorted neighbours are joined to 8,192 atoms, which keeps more
    than 0.99 of the variance of any column met in practice.
    """
    _require(n_resamples)
    ordered = values.sort().values
    n = len(ordered)
    if not bool(ordered.isfinite().all()):
        return torch.full((n_resamples,), math.nan, dtype=torch.float64, device=values.device)
    cell = torch.arange(n, device=values.device) * min(n, EXACT_ROWS) // n
    count = torch.bincount(cell).double()
    mean = torch.bincount(cell, weights=ordered) / count
    parts = [weights @ mean / n for weights in _weights(count, n, n_resamples, seed)]
    return torch.cat(parts)


def resample_predictions(
    predictions: Predictions,
    metric: Callable[[Predictions], float],
    n_resamples: int,
    seed: int,
) -> Float[Tensor, " r"]:
    """Any ``metric`` of whole resampled predictions, one after the other: general and slow."""
    _require(n_resamples)
    generator = torch.Generator().manual_seed(seed)
    n = len(predictions)
    draws = []
    for _ in range(n_resamples):
        rows = torch.randint(n, (n,), generator=generator).to(predictions.scores.device)
        draws.append(metric(predictions.select(rows)))
    return torch.tensor(draws, dtype=torch.float64)


def resample_classwise(
    predictions: Predictions, n_bins: int, n_resamples: int, seed: int
) -> Float[Tensor, " r"]:
    """Class-wise equal-width calibration errors (norm 1) of resamples, all classes together.

    Costs ``n k n_resamples`` operations.
    """
    _require(n_resamples)
    n, k, cells = len(predictions), predictions.classes, predictions.classes * n_bins
    device = predictions.scores.device
    generator = np.random.default_rng(seed)
    slices = list(predictions.row_blocks())
    shares = np.array([rows.stop - rows.start for rows in slices]) / n
    sizes = generator.multinomial(n, shares, size=n_resamples)  # examples drawn from each block
    total = torch.zeros((cells, n_resamples), dtype=torch.float64, device=device)
    for index, rows in enumerate(slices):
        p = predictions.probs(rows)
        residual = (p - predictions.targets(rows)).flatten()
        cell = assign_width(p, n_bins).add_(torch.arange(k, device=device) * n_bins).flatten()
        row = torch.arange(len(p), device=device).repeat_interleave(k)
        matrix = torch.sparse_coo_tensor(
            torch.stack([cell, row]), residual, (cells, len(p)), check_invariants=False
        )
        weights = _draw_blocks(generator, sizes[:, index], len(p)).to(device)
        total += torch.sparse.mm(matrix, weights.T)
    return total.abs().sum(dim=0) / (n * k)


def _draw_blocks(generator: np.random.Generator, sizes: np.ndarray, rows: int) -> Tensor:
    """How often each of ``rows`` examples occurs when ``sizes[r]`` are drawn for resample r."""
    picks = generator.integers(0, rows, int(sizes.sum()))
    picks += np.repeat(np.arange(len(sizes)) * rows, sizes)
    counts = np.bincount(picks, minlength=len(sizes) * rows).reshape(len(sizes), rows)
    return torch.from_numpy(counts).double()


def _profiles(scores: Confidences, n_resamples: int, seed: int) -> Iterator[Profile]:
    _require(n_resamples)
    c, t, count = _atoms(scores)
    for weights in _weights(count, len(scores), n_resamples, seed):
        yield _profile(c, weights, weights * t)


def _profile(c: Tensor, count: Tensor, hits: Tensor) -> Profile:
    """Profile of atoms, those of equal confidence joined to blocks."""
    last = torch.cat([c[1:] != c[:-1], torch.ones(1, dtype=torch.bool, device=c.device)])
    if bool(last.all()):
        return Profile(c, count, hits)
    ends = last.nonzero()[:, 0] + 1
    return Profile(c[last], segment_sums(count, ends), segment_sums(hits, ends))


def _atoms(scores: Confidences) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted confidences, outcomes and counts of what is resampled."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        n = len(scores)
        order = torch.argsort(scores.confidence)
        c, t = scores.confidence[order], scores.outcome[order]
        if n <= EXACT_ROWS:
            return c, t, torch.ones_like(c)
        cell = torch.arange(n, device=c.device) * CELLS // n
        key = cell * LEVELS + (t * LEVELS).long().clamp_(max=LEVELS - 1)
        count = torch.bincount(key, minlength=CELLS * LEVELS).double()
        mean_c = torch.bincount(key, weights=c, minlength=CELLS * LEVELS)
        mean_t = torch.bincount(key, weights=t, minlength=CELLS * LEVELS)
        filled = count > 0
        count = count[filled]
        mean_c, mean_t = mean_c[filled] / count, mean_t[filled] / count
        by_confidence = torch.argsort(mean_c)
        return mean_c[by_confidence], mean_t[by_confidence], count[by_confidence]

    return scores.cached("atoms", make)


def _weights(
    count: Float[Tensor, " m"], n: int, n_resamples: int, seed: int
) -> Iterator[Float[Tensor, "r m"]]:
    """Multinomial counts of the atoms, in chunks of resamples."""
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK_ELEMENTS // len(count))
    single = bool((count == 1).all())
    shares = (count / n).cpu().numpy()
    for start in range(0, n_resamples, chunk):
        size = min(chunk, n_resamples - start)
        if single:  # drawing indices is quicker than n binomials
            yield _draw_blocks(generator, np.full(size, n), n).to(count.device)
        else:
            drawn = generator.multinomial(n, shares / shares.sum(), size=size)
            yield torch.from_numpy(drawn).double().to(count.device)


def _require(n_resamples: int) -> None:
    if n_resamples < 1:
        raise ConfigError(f"n_resamples must be at least 1, got {n_resamples}")
