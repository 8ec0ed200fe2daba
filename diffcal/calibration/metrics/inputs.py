"""What a metric reads: confidences with outcomes, and the classifier outputs they come from.

:class:`Confidences` is one number in [0, 1] per example and what happened; every binned, kernel and
selective metric is a function of it. :class:`Predictions` makes it from logits or probabilities and
hard or soft labels, checks them once, and shares one float64 pass over the rows and one sort among
all metrics computed from it.

With a soft label q the outcome of a prediction is ``q[predicted]``, the probability that a label
drawn from q equals the prediction, so that a one-hot q gives exactly the hard-label value.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from diffcal.calibration.metrics.profile import PIECE, Profile
from diffcal.calibration.metrics.row_reading import RowValues, Unreadable, read_rows
from diffcal.core.tensors import as_tensor
from diffcal.errors import DataError

__all__ = ["BLOCK_ELEMENTS", "Confidences", "Predictions", "SUM_TOLERANCE"]

SUM_TOLERANCE = 1e-3
"""How far the sum of a row of probabilities or of a soft label may be from 1, besides what half
precision rounds away."""

ROUNDING = 1e-6
"""How far a confidence may exceed 1 by rounding; it then counts as 1."""

BLOCK_ELEMENTS = 1 << 18
"""Entries of a float64 block of rows: 2 MiB, so that temporaries stay in the cache."""

PASS_ELEMENTS = 1 << 20
"""The same for the first pass, which keeps a single block: 8 MiB."""

SHORT_ROWS = 16
"""Classes below which a softmax is taken along the first axis."""

T = TypeVar("T")


class Confidences:
    """Confidences in [0, 1] with outcomes in [0, 1], and what metrics share about them.

    Args:
        confidence: ``[n]``; for a binary problem the probability of the event.
        outcome: ``[n]``; 1 where the event happened (the prediction was right), 0 where not; a
            number between when only its probability is known. Integers and booleans are taken too.

    Raises:
        DataError: empty, other shapes, NaN, or values outside [0, 1] (by more than rounding).
    """

    def __init__(self, confidence: Tensor | np.ndarray, outcome: Tensor | np.ndarray) -> None:
        c = as_tensor(confidence, "confidence").double()
        t = as_tensor(outcome, "outcome").to(c)
        if c.ndim != 1 or c.shape != t.shape:
            raise DataError(
                "confidence and outcome must be vectors of one length, "
                f"got {list(c.shape)} and {list(t.shape)}"
            )
        if len(c) == 0:
            raise DataError("no examples: metrics of an empty set are undefined")
        checked = []
        for name, values in (("confidence", c), ("outcome", t)):
            low, high = (float(v) for v in values.aminmax())
            if not (low >= 0 and high <= 1 + ROUNDING):  # also false for NaN
                raise DataError(
                    f"{name} must lie in [0, 1]; found values from {low:.9g} to {high:.9g}"
                )
            if high > 1:  # as torch's softmax in float32 gives now and then
                values = values.clamp(max=1)
            checked.append(values)
        self._assign(*checked)

    def _assign(self, confidence: Float[Tensor, " n"], outcome: Tensor) -> None:
        self.confidence = confidence
        self._outcome = outcome  # booleans for hard labels: an eighth of the memory
        self._cache: dict[Any, Any] = {}

    @property
    def outcome(self) -> Float[Tensor, " n"]:
        """Outcomes as float64 (made anew on each access where they are kept as booleans)."""
        return self._outcome.double()

    @property
    def raw_outcome(self) -> Shaped[Tensor, " n"]:
        """Outcomes as they are kept: booleans where labels are hard, else float64."""
        return self._outcome

    def __len__(self) -> int:
        return len(self.confidence)

    @property
    def profile(self) -> Profile:
        """Sorted distinct confidences with counts and outcomes; sorted once."""
        return self.cached("profile", lambda: Profile.of(self.confidence, self._outcome))

    def pieces(self) -> Iterator[tuple[Float[Tensor, " m"], Shaped[Tensor, " m"]]]:
        """Confidences and outcomes (booleans where they are kept so) in pieces that fit the cache."""
        return zip(self.confidence.split(PIECE), self._outcome.split(PIECE), strict=True)

    @property
    def mean_outcome(self) -> float:
        """Share of examples whose event happened; the accuracy of a classifier."""
        return float(self._outcome.sum(dtype=torch.float64)) / len(self)

    @property
    def moments(self) -> dict[str, float]:
        """Means of c, t, c², t², c t and (c - t)² over the examples, for confidences c, outcomes t."""

        def make() -> dict[str, float]:
            total = torch.zeros(6, dtype=torch.float64, device=self.confidence.device)
            for c, kept in self.pieces():
                t = kept.double()
                parts = (c, t, c.square(), t.square(), c * t, (c - t).square())
                total += torch.stack([part.sum() for part in parts])
            names = ("c", "t", "cc", "tt", "ct", "residual")
            return dict(zip(names, (total / len(self)).tolist(), strict=True))

        return self.cached("moments", make)

    def is_cached(self, key: Any) -> bool:
        """Whether ``key`` is remembered already."""
        return key in self._cache

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """``make()``, remembered under ``key`` so that metrics computed together share it."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


class Predictions(Confidences):
    """Outputs of a classifier with their labels; as :class:`Confidences`, those of the top label.

    Give exactly one of ``logits`` and ``probs`` and exactly one of ``labels`` and ``soft_labels``;
    none is ever guessed from values. The predicted class is the lowest index among equal maxima.
    Everything is computed in float64 in blocks of rows; the inputs are referred to, not copied. Only
    on the CPU, with 64 classes or more, are exponentials of single (and half) precision logits taken
    in float32, without loss near confidence 1: the rounding of such logits z, ``|z| 2^-24``, is the
    larger error.

    Args:
        logits: ``[n, k]``, floating, finite.
        probs: ``[n, k]``, non-negative rows that sum to 1 within 1e-3.
        labels: ``[n]`` integers in 0..k-1.
        soft_labels: ``[n, k]`` non-negative rows that sum to 1 within 1e-3.
        renormalize: Divide rows of ``probs`` by their sums first (any positive sum is then allowed).
        eps: Probabilities below this count as this in the log score; 0 gives infinity where a
            probability of 0 was given to a class that occurred. Only for ``probs``.
        with_scores: Whether to sum log and Brier scores in the first reading. Without, they cost a
            second one if asked for, and the first one is quicker.

    Attributes:
        confidence, outcome: see :class:`Confidences`, float64 ``[n]``.
        mean_log_score, mean_brier: means of :attr:`log_score` and :attr:`brier`.

    Raises:
        DataError: NaN or infinite values, labels out of range, probabilities that do not sum to 1
            (logits passed as probabilities, for example), fewer than two classes, no rows.
    """

    def __init__(
        self,
        *,
        logits: Tensor | np.ndarray | None = None,
        probs: Tensor | np.ndarray | None = None,
        labels: Tensor | np.ndarray | None = None,
        soft_labels: Tensor | np.ndarray | None = None,
        renormalize: bool = False,
        eps: float = 0.0,
        with_scores: bool = True,
    ) -> None:
        if (logits is None) == (probs is None):
            raise DataError("give exactly one of logits and probs")
        if (labels is None) == (soft_labels is None):
            raise DataError("give exactly one of labels and soft_labels")
        self.is_logits = logits is not None
        what = "logits" if self.is_logits else "probs"
        scores = as_tensor(logits if logits is not None else probs, what)
        if scores.ndim != 2 or not scores.is_floating_point():
            raise DataError(
                f"{what} must be floating of shape [n, k], got {scores.dtype} {list(scores.shape)}"
            )
        n, self.classes = scores.shape
        if n == 0:
            raise DataError("no examples: metrics of an empty set are undefined")
        if self.classes < 2:
            raise DataError(
                f"{what} have {self.classes} class; a classifier needs at least 2 "
                "(for one probability per example use Confidences)"
            )
        self.scores = scores
        self._renormalize = renormalize
        self._eps = eps
        self.labels = None if labels is None else _hard(labels, n, self.classes, scores.device)
        self.soft_labels = None if soft_labels is None else _soft(soft_labels, scores)
        self._pass(with_scores)

    @property
    def predicted(self) -> Int[Tensor, " n"]:
        """Predicted class of each example, int64."""
        return self._predicted.long()

    @property
    def log_score(self) -> Float[Tensor, " n"]:
        """Cross-entropy of label and prediction of each example, nats, float64."""
        return self._rows()[0]

    @property
    def brier(self) -> Float[Tensor, " n"]:
        """Squared distance of prediction and (one-hot) label, summed over classes, float64."""
        return self._rows()[1]

    @property
    def mean_log_score(self) -> float:
        """Mean of :attr:`log_score`."""
        return self._score_means()[0]

    @property
    def mean_brier(self) -> float:
        """Mean of :attr:`brier`."""
        return self._score_means()[1]

    @property
    def is_soft(self) -> bool:
        """Whether labels are distributions."""
        return self.soft_labels is not None

    def row_blocks(self, elements: int | None = None) -> Iterator[slice]:
        """Slices that cover the rows, each of about ``elements`` (``BLOCK_ELEMENTS``) entries."""
        size = max(1, (elements or BLOCK_ELEMENTS) // self.classes)
        for start in range(0, len(self.scores), size):
            yield slice(start, min(start + size, len(self.scores)))

    def probs(self, rows: slice | Tensor = slice(None)) -> Float[Tensor, "n k"]:
        """Probabilities of some rows in float64; all rows at once only where n·k is small."""
        block = self.scores[rows].double()
        if self.is_logits:
            if self.classes < SHORT_ROWS:  # softmax along short rows takes several times as long
                return block.t().contiguous().softmax(dim=0).t().contiguous()
            return block.softmax(dim=1)
        return block / block.sum(dim=1, keepdim=True) if self._renormalize else block

    def class_probs(self, index: int) -> Float[Tensor, " n"]:
        """Probabilities of one class in float64, without holding those of the others."""
        return self.columns(slice(index, index + 1))[:, 0]

    def columns(self, classes: slice) -> Float[Tensor, "n c"]:
        """Probabilities of a few classes for all rows, float64."""
        block = self.scores[:, classes].double()
        if self.is_logits:
            return block.sub(self._rows()[2][:, None]).exp_()
        return block / self._rows()[2][:, None] if self._renormalize else block

    def targets(self, rows: slice | Tensor = slice(None)) -> Float[Tensor, "n k"]:
        """Labels of some rows as float64 distributions."""
        if self.soft_labels is not None:
            return self.soft_labels[rows].double()
        assert self.labels is not None
        y = self.labels[rows]
        return torch.zeros((len(y), self.classes), dtype=torch.float64, device=y.device).scatter_(
            1, y[:, None], 1.0
        )

    def class_targets(self, index: int) -> Float[Tensor, " n"]:
        """Outcome of one class for all rows: 1 where it is the label, or its soft label."""
        if self.soft_labels is not None:
            return self.soft_labels[:, index].double()
        assert self.labels is not None
        return (self.labels == index).double()

    def select(self, rows: Tensor) -> "Predictions":
        """The predictions of some rows (indices may repeat), as new predictions."""
        y, q = self.labels, self.soft_labels
        made = Predictions.__new__(Predictions)
        made.is_logits, made.classes = self.is_logits, self.classes
        made._renormalize, made._eps = self._renormalize, self._eps
        made.scores = self.scores[rows]
        made.labels = None if y is None else y[rows]
        made.soft_labels = None if q is None else q[rows]
        made._pass(with_scores=True)
        return made

    def scaled(self, temperature: float) -> "Predictions":
        """The predictions with logits divided by ``temperature`` (log-probabilities if of probs)."""
        if not temperature > 0:
            raise DataError(f"temperature must be positive, got {temperature:g}")
        if not self.is_logits and bool((self.scores == 0).any()):
            raise DataError(
                "probabilities of exactly 0 cannot be scaled by a temperature: pass logits"
            )
        z = self.scores.double() if self.is_logits else self.scores.double().log()
        return Predictions(logits=z / temperature, labels=self.labels, soft_labels=self.soft_labels)

    def _rows(self) -> Tensor:
        """Log score, Brier score and normaliser of every row ``[3, n]``, made when first needed."""

        def make() -> Tensor:
            shape = (3, len(self))
            table = torch.empty(shape, dtype=torch.float64, device=self.scores.device)
            if self._quick:
                self._read_quickly(with_scores=True, rows_into=table)
                if not self.is_soft:
                    return table
                for rows, columns in self._blocks():  # all but the normaliser
                    table[:2, rows] = torch.stack(columns[2:4])
                return table
            for rows, columns in self._blocks():
                table[:, rows] = torch.stack(columns[2:5])
            return table

        return self.cached("rows", make)

    def _score_means(self) -> tuple[float, float]:
        def make() -> tuple[float, float]:
            if self._quick and not self.is_soft:
                made = self._read_quickly(with_scores=True)
                assert made is not None
                return made
            totals = torch.zeros(2, dtype=torch.float64, device=self.scores.device)
            for _, columns in self._blocks():
                totals += torch.stack([score.sum() for score in columns[2:4]])
            log_score, brier = (totals / len(self)).tolist()
            return log_score, brier

        return self.cached("score means", make)

    def _pass(self, with_scores: bool) -> None:
        """Read everything once: confidences and outcomes are kept, scores only summed."""
        n, device = len(self.scores), self.scores.device
        small = torch.int16 if self.classes < 2**15 else torch.int32
        self._predicted = torch.empty(n, dtype=small, device=device)
        confidence = torch.empty(n, dtype=torch.float64, device=device)
        kind = torch.float64 if self.is_soft else torch.bool
        outcome = torch.empty(n, dtype=kind, device=device)
        self._assign(confidence, outcome)
        self._quick = device.type == "cpu" and not self._renormalize
        if self._quick:
            try:
                hard = not self.is_soft
                means = self._read_quickly(with_scores=with_scores and hard, keep=True)
                if means is not None:
                    self.cached("score means", lambda: means)
                return
            except Unreadable:
                self._quick = False  # for the slower path to name the row, or accept it
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        for rows, (top, right, log_score, brier, _, index) in self._blocks():
            confidence[rows], outcome[rows], self._predicted[rows] = top, right, index
            totals += torch.stack([log_score.sum(), brier.sum()])
        means = tuple((totals / n).tolist())
        self.cached("score means", lambda: means)

    def _read_quickly(
        self, *, with_scores: bool, keep: bool = False, rows_into: Tensor | None = None
    ) -> tuple[float, float] | None:
        """Means of the log and Brier scores, if asked for, by :mod:`row_reading`.

        Args:
            keep: Set confidences, outcomes and predicted classes.
            rows_into: ``[3, n]``, takes log score, Brier score and normaliser of every row.

        Confidences and normalisers of rows with soft labels are read here too, so that they are those
        of hard labels to the last bit (binned and ranking measures see ties); their scores are not.
        """
        sums: dict[int, tuple[float, float]] = {}
        kept = [x.numpy() for x in (self.confidence, self._outcome, self._predicted)]
        table = None if rows_into is None else rows_into.numpy()

        def take(rows: slice, values: RowValues) -> None:
            if keep:
                right = values.right
                if self.soft_labels is not None:
                    at = torch.from_numpy(values.predicted.astype(np.int64))[:, None]
                    right = self.soft_labels[rows].double().gather(1, at)[:, 0].numpy()
                made = (values.confidence, right, values.predicted)
                for column, value in zip(kept, made, strict=True):
                    column[rows] = value
            if values.log_score is not None and values.brier is not None:
                sums[rows.start] = float(values.log_score.sum()), float(values.brier.sum())
                if table is not None:
                    table[:, rows] = values.log_score, values.brier, values.normaliser

        labels = self.labels
        if labels is None:
            labels = torch.zeros(len(self), dtype=torch.int64)
        read_rows(
            self.scores,
            labels,
            logits=self.is_logits,
            with_scores=with_scores,
            eps=self._eps,
            sum_tolerance=SUM_TOLERANCE,
            take=take,
        )
        if not with_scores:
            return None
        # so that the number of threads changes nothing
        ordered = [sums[start] for start in sorted(sums)]
        log_score, brier = (sum(column) for column in zip(*ordered, strict=True))
        return log_score / len(self), brier / len(self)

    def _blocks(self) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """For blocks of rows: confidence, outcome, log score, Brier score, normaliser, class."""
        # one buffer for all blocks: fresh memory for each costs more than the arithmetic
        first = next(self.row_blocks(PASS_ELEMENTS))
        size = (first.stop, self.classes)
        buffer = torch.empty(size, dtype=torch.float64, device=self.scores.device)
        read = self._read_logits if self.is_logits else self._read_probs
        for rows in self.row_blocks(PASS_ELEMENTS):
            block = buffer[: rows.stop - rows.start].copy_(self.scores[rows])
            yield rows, read(rows, block)

    def _read_logits(self, rows: slice, z: Tensor) -> tuple[Tensor, ...]:
        """Columns of some rows; ``z`` is their float64 copy and is overwritten."""
        block = self.scores[rows]
        top, index = block.max(dim=1)
        if not bool((top.isfinite() & block.amin().isfinite()).all()):  # the largest shows NaN too
            _require_finite(block, "logits", rows.start)
        top = top.double()
        z.sub_(top[:, None])
        if self.soft_labels is not None:
            q = self.soft_labels[rows].double()
            mean_z = (q * z).sum(dim=1)
            right = q.gather(1, index[:, None])[:, 0]
            e = z.exp_()
            norm = e.sum(dim=1)
            # q need not sum to exactly 1; its cross-entropy with a distribution then still is exact
            log_score = norm.log().mul_(q.sum(dim=1)).sub_(mean_z)
            brier = e.div_(norm[:, None]).sub_(q).square_().sum(dim=1)
        else:
            assert self.labels is not None
            y = self.labels[rows]
            right = index == y
            z_y = z.gather(1, y[:, None])[:, 0]
            e = z.exp_()
            norm = e.sum(dim=1)
            log_score = norm.log().sub_(z_y)
            p_y = z_y.exp_() / norm
            squares = e.square_().sum(dim=1).div_(norm).div_(norm)
            brier = squares.sub_(p_y, alpha=2).add_(1).clamp_(min=0)
        return norm.reciprocal(), right, log_score, brier, norm.log().add_(top), index

    def _read_probs(self, rows: slice, p: Tensor) -> tuple[Tensor, ...]:
        """Columns of some rows; ``p`` is their float64 copy and may be overwritten."""
        sums = p.sum(dim=1)
        if not bool(sums.isfinite().all()):
            _require_finite(p, "probs", rows.start)
        dtype = self.scores.dtype
        _check_distribution(p, sums, "probs", rows.start, dtype, any_sum=self._renormalize)
        if self._renormalize:
            p = p.div_(sums[:, None])
        index = p.argmax(dim=1)
        top = p.gather(1, index[:, None])[:, 0].clamp_(max=1)
        floored = p.clamp(min=self._eps) if self._eps > 0 else p
        if self.soft_labels is not None:
            q = self.soft_labels[rows].double()
            right = q.gather(1, index[:, None])[:, 0]
            log_score = -torch.special.xlogy(q, floored).sum(dim=1)
            brier = (p - q).square_().sum(dim=1)
        else:
            assert self.labels is not None
            y = self.labels[rows][:, None]
            right = index == y[:, 0]
            log_score = floored.gather(1, y)[:, 0].log().neg_()
            p_y = p.gather(1, y)[:, 0]
            brier = p.square().sum(dim=1).sub_(p_y.square()).add_((1 - p_y).square_())
        return top, right, log_score, brier, sums, index


def _hard(
    labels: Tensor | np.ndarray, n: int, classes: int, device: torch.device
) -> Int[Tensor, " n"]:
    y = as_tensor(labels, "labels")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise DataError(f"labels must be integers, got {y.dtype}; distributions go to soft_labels")
    if y.ndim != 1 or len(y) != n:
        raise DataError(f"labels must have shape [{n}], got {list(y.shape)}")
    # by numpy, as torch's other threads would keep their cores busy for milliseconds afterwards
    ends = y.numpy() if y.device.type == "cpu" else y
    low, high = int(ends.min()), int(ends.max())
    if low < 0 or high >= classes:
        raise DataError(f"labels run from {low} to {high}, but there are {classes} classes")
    return y.to(device=device, dtype=torch.int64)


def _soft(soft_labels: Tensor | np.ndarray, scores: Tensor) -> Tensor:
    q = as_tensor(soft_labels, "soft_labels").to(scores.device)
    if not q.is_floating_point() or q.shape != scores.shape:
        raise DataError(
            f"soft_labels must be floating of shape {list(scores.shape)}, "
            f"got {q.dtype} {list(q.shape)}"
        )
    rows = max(1, BLOCK_ELEMENTS // q.shape[1])
    for start in range(0, len(q), rows):
        block = q[start : start + rows].double()
        sums = block.sum(dim=1)
        if not bool(sums.isfinite().all()):
            _require_finite(block, "soft_labels", start)
        _check_distribution(block, sums, "soft_labels", start, q.dtype)
    return q


def _require_finite(block: Tensor, what: str, start: int) -> None:
    finite = block.isfinite().all(dim=1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise DataError(
            f"{what} hold NaN or infinite values ({int((~finite).sum())} rows in this block, "
            f"the first is row {start + bad}); where classes are masked, give them a large negative "
            "logit such as -1e4, or probability 0"
        )


def _check_distribution(
    p: Tensor, sums: Tensor, what: str, start: int, dtype: torch.dtype, any_sum: bool = False
) -> None:
    if float(p.min()) < 0:
        row = int((p < 0).any(dim=1).nonzero()[0])
        hint = "; logits go to logits=" if what == "probs" else ""
        raise DataError(
            f"{what} must not be negative: row {start + row} holds {float(p[row].min()):g}{hint}"
        )
    tolerance = SUM_TOLERANCE
    if dtype in (torch.float16, torch.bfloat16):
        tolerance += (
            torch.finfo(dtype).eps / 2
        )  # every entry is off by half a unit of its last place
    off = (sums <= 0) if any_sum else (sums - 1).abs() > tolerance
    if bool(off.any()):
        row = int(off.nonzero()[0])
        hint = "" if what != "probs" else "; logits go to logits=, or pass renormalize=True"
        raise DataError(
            f"{what} must sum to 1 within {tolerance:g}: "
            f"row {start + row} sums to {float(sums[row]):.6g}{hint}"
        )
