"""Many attribution methods judged against one set of subset models; shared by the LDS benchmarks.

A benchmark makes a :class:`Judge` from subset masks and losses, hands it features (``kernel``), score
blocks (``rows``), scores (``scores``) or nothing but the losses themselves (``retrained``), asks for
paired differences (``gap``), and writes :func:`markdown` and :func:`figure` of the records.

Everything is judged in the same way: subsets are dealt to two folds, a damping (or a datamodel) is
fitted on one fold and judged on the other, and the LDS is the mean over folds. A method that fits
nothing is judged on the same folds. Intervals are 95 % over subsets (within folds) and queries, and
all methods meet the same resamples, so that differences are paired.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcal.attribution import (
    LDS,
    ScoreBlock,
    ScoreConfig,
    choose_damping,
    cross_fitted_lds,
    datamodel_scores,
    empirical_influence,
    fit_kernel,
    lds_controls,
    lds_difference,
    linear_datamodeling_score,
    path_predictions,
    predictions_of,
    residual_weights,
    rest_of,
    score_path,
    stream_predictions,
    subset_folds,
)
from diffcal.attribution.readouts import read_out

__all__ = ["READOUTS", "Judge", "figure", "gap_table", "markdown", "percent"]

READOUTS = ("signed", "square", "signed_square", "abs")

Record = dict[str, Any]


class Judge:
    """Collects one record for each method, readout and set of queries.

    Args:
        masks: Which training examples each subset holds, ``[s, n]``.
        losses: For each set of queries, losses of the subsets' models ``[s, q]``.
        likeness: For each set of queries, by name, predictions ``[s, q]`` of likeness scores, that
            controls are compared with.
        folds, resamples, seed: Of judging; see the module.
    """

    def __init__(
        self,
        masks: Tensor,
        losses: Mapping[str, Tensor],
        *,
        likeness: Mapping[str, Mapping[str, Tensor]] | None = None,
        folds: int = 2,
        resamples: int = 500,
        seed: int = 0,
    ) -> None:
        self.masks, self.losses = masks, dict(losses)
        self.likeness = likeness or {}
        self.folds, self.resamples, self.seed = folds, resamples, seed
        self.records: list[Record] = []
        self._judged: dict[tuple[str, str, str], LDS] = {}
        self._own: dict[tuple[str, str, str], LDS] = {}

    def kernel(
        self,
        method: str,
        training: Tensor,
        queries: Mapping[str, Tensor],
        *,
        settings: ScoreConfig | None = None,
        errors: Tensor | None = None,
        readouts: Sequence[str] = READOUTS,
        controls: Sequence[str] = (),
        **facts: Any,
    ) -> None:
        """Kernel scores of features, over the dampings of ``settings``.

        Args:
            training: Features of the training examples ``[n, k]``.
            queries: Features of each set of queries ``[q, k]``.
            errors: Training error table ``[n, t]``, where the settings have a residual.
            controls: Readouts of which controls are made, at the damping chosen on all subsets.
            facts: Kept in the records, for tables.
        """
        settings = settings or ScoreConfig()
        kernel = fit_kernel(training)
        grid = [*settings.absolute_grid(kernel), settings.absolute_damping(kernel)]
        residual = None
        if settings.residual != "none":
            assert errors is not None
            residual = residual_weights(errors, settings.residual)
        for track, features in queries.items():
            # One pass: every readout is a function of the signed scores.
            path = score_path(
                kernel,
                features,
                training,
                grid,
                residual=residual,
                leverage=settings.leverage,
                norm=settings.norm,
                readout="signed",
                dtype=torch.float64,
                block_rows=len(training),
            )
            ((_, signed),) = path
            for readout in readouts:
                self._over_dampings(
                    method,
                    readout,
                    track,
                    signed,
                    settings.damping_grid,
                    settings.damping,
                    readout in controls,
                    {**facts, "damping_rule": settings.damping_rule},
                )

    def dampings(
        self,
        method: str,
        track: str,
        signed: Tensor,
        grid: Sequence[float],
        own: float,
        *,
        readouts: Sequence[str] = READOUTS,
        **facts: Any,
    ) -> None:
        """Signed scores ``[q, n]`` at each damping of ``grid`` and, last, at the method's own."""
        for readout in readouts:
            self._over_dampings(method, readout, track, signed, tuple(grid), own, False, facts)

    def _over_dampings(
        self,
        method: str,
        readout: str,
        track: str,
        signed: Tensor,
        grid: tuple[float, ...],
        own: float,
        with_controls: bool,
        facts: Record,
    ) -> None:
        guesses = path_predictions([(0, read_out(signed, readout))], self.masks)
        choice = choose_damping(
            guesses[:-1],
            self.losses[track],
            grid,
            folds=self.folds,
            seed=self.seed,
            n_resamples=self.resamples,
        )
        best = grid.index(choice.chosen)
        default = linear_datamodeling_score(
            guesses[-1], self.losses[track], n_resamples=self.resamples, seed=self.seed
        )
        self._own[method, readout, track] = default
        self._keep(
            method,
            readout,
            track,
            choice.held_out,
            facts,
            default=_plain(default),
            default_damping=own,
            optimistic=round(choice.optimistic, 5),
            damping=choice.chosen,
            damping_of_fold=list(choice.per_fold),
            curve=[round(value, 4) for value in choice.curve.tolist()],
            controls=self._controls(guesses[best], track) if with_controls else None,
        )

    def scores(
        self,
        method: str,
        track: str,
        scores: Tensor,
        *,
        readouts: Sequence[str] = ("signed",),
        controls: Sequence[str] = (),
        **facts: Any,
    ) -> None:
        """Scores ``[q, n]`` without anything fitted."""
        for readout in readouts:
            self._unfitted(
                method,
                readout,
                track,
                predictions_of(read_out(scores, readout), self.masks),
                controls,
                facts,
            )

    def rows(
        self,
        method: str,
        blocks: Callable[[str], Iterable[ScoreBlock]],
        *,
        tracks: Sequence[str] | None = None,
        controls: Sequence[str] = (),
        **facts: Any,
    ) -> None:
        """Signed scores of each set of queries, given block by block (dot, cosine, TracIn, GAS)."""
        for track in tracks or self.losses:
            guess = stream_predictions(blocks(track), self.masks)
            self._unfitted(method, "signed", track, guess, controls, facts)

    def retrained(self, folds: int | None = None, **facts: Any) -> None:
        """Empirical influence and datamodels, made from the losses outside each fold.

        Args:
            folds: In place of the judge's own: with few subsets half of them may all hold, or all lack,
                some example, whose influence then cannot be measured.
        """
        makers = {"empirical influence": empirical_influence, "datamodel": datamodel_scores}
        dealt = subset_folds(len(self.masks), folds or self.folds, self.seed)
        for name, make in makers.items():
            for track, losses in self.losses.items():
                tables = []
                for held in dealt:
                    rest = rest_of(held, len(self.masks))
                    tables.append(predictions_of(make(self.masks[rest], losses[rest]), self.masks))
                found = cross_fitted_lds(
                    tables, losses, dealt, n_resamples=self.resamples, seed=self.seed
                )
                used = len(self.masks) - len(dealt[0])
                self._keep(name, "signed", track, found, {**facts, "subset_models": used})

    def gap(
        self, first: tuple[str, str], second: tuple[str, str], track: str, *, own: bool = False
    ) -> Record:
        """LDS of one (method, readout) minus that of another, with its paired interval.

        Args:
            own: At the methods' own dampings, on all subsets.
        """
        found = self._own if own else self._judged
        value, spread = lds_difference(found[(*first, track)], found[(*second, track)])
        return {
            "first": list(first),
            "second": list(second),
            "track": track,
            "difference": round(value, 5),
            "low": round(spread.low, 5),
            "high": round(spread.high, 5),
        }

    def _unfitted(
        self,
        method: str,
        readout: str,
        track: str,
        guess: Tensor,
        controls: Sequence[str],
        facts: Record,
    ) -> None:
        losses = self.losses[track]
        dealt = subset_folds(len(losses), self.folds, self.seed)
        found = cross_fitted_lds(
            [guess] * self.folds, losses, dealt, n_resamples=self.resamples, seed=self.seed
        )
        whole = linear_datamodeling_score(guess, losses, n_resamples=self.resamples, seed=self.seed)
        self._own[method, readout, track] = whole
        self._keep(
            method,
            readout,
            track,
            found,
            facts,
            default=_plain(whole),
            controls=self._controls(guess, track) if readout in controls else None,
        )

    def _keep(
        self, method: str, readout: str, track: str, judged: LDS, facts: Record, **more: Any
    ) -> None:
        key = (method, readout, track)
        if key in self._judged:
            raise ValueError(f"{key} was judged before")
        self._judged[key] = judged
        self.records.append(
            {
                "method": method,
                "readout": readout,
                "track": track,
                **facts,
                "lds": _plain(judged),
                **{name: value for name, value in more.items() if value is not None},
            }
        )

    def _controls(self, guess: Tensor, track: str) -> Record:
        found = lds_controls(
            guess,
            self.losses[track],
            likeness=self.likeness.get(track),
            n_resamples=2,
            seed=self.seed,
        )
        return {name: round(value.mean, 5) for name, value in found.items()}


def _plain(lds: LDS) -> Record:
    """Mean, 95 % interval over subsets and queries, standard deviation over subsets."""
    both = lds.over_both
    values = {"mean": lds.mean, "low": both.low, "high": both.high, "sd": lds.over_subsets.sd}
    return {name: round(value, 5) for name, value in values.items()}


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def markdown(
    records: Sequence[Record],
    tracks: Sequence[str],
    readouts: Sequence[str] = READOUTS,
    *,
    by: str = "lds",
) -> str:
    """One row for each method, one column for each set of queries and readout, in percent.

    Args:
        by: ``lds`` (judged on held-out subsets, with its interval), ``optimistic`` (damping chosen on
            the subsets that judge) or ``default`` (the method's own damping, all subsets).
    """
    methods = list(dict.fromkeys(record["method"] for record in records))
    found = {(r["method"], r["readout"], r["track"]): r for r in records}
    used = [o for o in readouts if any(r["readout"] == o for r in records)]
    columns = [(track, readout) for track in tracks for readout in used]
    head = ["method", *(f"{track}, {readout}" for track, readout in columns)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method in methods:
        cells = []
        for track, readout in columns:
            cells.append(_cell(found.get((method, readout, track)), by))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(record: Record | None, by: str) -> str:
    if record is None or by not in record:
        return "–"
    value = record[by]
    if not isinstance(value, Mapping):
        return percent(value)
    return f"{percent(value['mean'])} [{percent(value['low'], 0)}, {percent(value['high'], 0)}]"


def gap_table(gaps: Iterable[Record]) -> str:
    """Paired differences as a table."""
    lines = ["| queries | first | second | first - second |", "|---|---|---|---|"]
    for gap in gaps:
        first, second = (
            f"{method} ({readout})" for method, readout in (gap["first"], gap["second"])
        )
        interval = f"{percent(gap['difference'])} [{percent(gap['low'])}, {percent(gap['high'])}]"
        lines.append(f"| {gap['track']} | {first} | {second} | {interval} |")
    return "\n".join(lines)


def figure(
    panels: Sequence[tuple[str, Sequence[Record]]],
    path: Path,
    tracks: Sequence[str],
    *,
    readouts: Sequence[str] = ("signed", "square"),
    names: Mapping[str, str] | None = None,
) -> None:
    """Points with 95 % intervals: one row of axes for each panel, one column for each track.

    Methods stand from top to bottom in the order of the records; filled marks are squared scores.
    """
    from matplotlib.figure import Figure

    names = names or {}
    heights = [len(dict.fromkeys(r["method"] for r in records)) for _, records in panels]
    size = (10, 0.25 * sum(heights) + 0.8 * len(panels) + 0.8)
    drawing = Figure(figsize=size, layout="constrained")
    grid = drawing.subplots(
        len(panels),
        len(tracks),
        squeeze=False,
        sharey="row",
        sharex="col",
        gridspec_kw={"height_ratios": [height + 1 for height in heights]},
    )
    styles = {
        "signed": {"marker": "o", "markerfacecolor": "white", "color": "#4878a8"},
        "square": {"marker": "o", "color": "#c2502e"},
        "signed_square": {"marker": "D", "color": "#6a9c52"},
        "abs": {"marker": "s", "color": "#8a6fae"},
    }
    for row, (title, records) in enumerate(panels):
        methods = list(dict.fromkeys(record["method"] for record in records))
        for column, track in enumerate(tracks):
            axes = grid[row][column]
            for index, readout in enumerate(readouts):
                these = [r for r in records if (r["readout"], r["track"]) == (readout, track)]
                if not these:
                    continue
                shift = 0.16 * (index - (len(readouts) - 1) / 2)
                places = [methods.index(r["method"]) + shift for r in these]
                means = [100 * r["lds"]["mean"] for r in these]
                below = [100 * (r["lds"]["mean"] - r["lds"]["low"]) for r in these]
                above = [100 * (r["lds"]["high"] - r["lds"]["mean"]) for r in these]
                axes.errorbar(
                    means,
                    places,
                    xerr=[[max(v, 0) for v in below], [max(v, 0) for v in above]],
                    linestyle="none",
                    markersize=4.5,
                    linewidth=1.1,
                    label=readout.replace("_", " "),
                    **styles[readout],
                )
            axes.axvline(0, color="0.6", linewidth=0.8)
            axes.grid(axis="x", alpha=0.3)
            axes.set_title(f"{title}: {track} queries", fontsize=10, loc="left")
            axes.set_ylim(len(methods) - 0.4, -0.6)
            if column == 0:
                axes.set_yticks(
                    range(len(methods)), [names.get(name, name) for name in methods], fontsize=8
                )
            if row == len(panels) - 1:
                axes.set_xlabel("LDS, % (95 % interval over subsets and queries)")
    # Readouts that only some panels have still belong into the legend.
    marks = {}
    for axes in drawing.axes:
        for mark, label in zip(*axes.get_legend_handles_labels(), strict=True):
            marks.setdefault(label, mark)
    drawing.legend(
        list(marks.values()), list(marks), fontsize=9, loc="outside upper right", ncols=len(marks)
    )
    drawing.savefig(path, dpi=130)
