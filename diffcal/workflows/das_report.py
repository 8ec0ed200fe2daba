"""``diffcal das explain``: a gallery of queries with the training images behind them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffcal.core.runs import read_json, sha256_file
from diffcal.data.images import encode_png
from diffcal.data.sources import open_images
from diffcal.errors import ArtifactError, ConfigError
from diffcal.workflows import html
from diffcal.workflows.das_groups import group_section, stored_shares
from diffcal.workflows.das_held_out import copy_section

__all__ = [
    "Explanation",
    "explain_scores",
    "explanation_blocks",
    "load_explanations",
    "manifest_of_scores",
    "near_copies",
]

FORMAT = "diffcal-scores/1"
SHOWN = 12
"""Queries on a page unless they are named."""
COPIES = 10
"""Rows of the table of likely copies."""


@dataclass(frozen=True)
class Explanation:
    """One query: PNG bytes and words for it and for the training images beside it."""

    query: int | str
    caption: str
    image: bytes
    top: tuple[tuple[bytes, str], ...]
    """Most influential first."""
    lowest: tuple[tuple[bytes, str], ...]
    """Most opposing first; only for signed scores."""
    nearest: tuple[tuple[bytes, str], ...]
    facts: dict[str, float]
    """``contributors``, ``dominance``, ``likeness``, ``isolation``, ``copy_score``."""


def explain_scores(
    scores: Path,
    queries: Sequence[str] = (),
    *,
    top: int = 10,
    out: Path | None = None,
    data: str | None = None,
    groups: Sequence[str] = (),
    royalties: float | None = None,
) -> dict[str, Any]:
    """Write a page that shows queries, what they owe themselves to, and what merely resembles them.

    Args:
        scores: Folder of ``diffcal das score``.
        queries: Ids of the queries to show; the first dozen if none.
        top: Training images to show for each.
        out: File to write; ``SCORES/gallery.html`` if None.
        data: Where the training images are now, if they moved.
        groups: Further columns of the training images by which to share attribution out. Those that
            were not scored are computed from the stored features, without any gradients.
        royalties: An amount to divide in proportion to the shares.

    Returns:
        ``gallery`` (file), ``queries`` (shown) and, if asked for, ``groups`` (shares by column).

    Raises:
        ArtifactError: no finished scores there, or damaged; the index behind them is gone.
        ConfigError: a query that was not scored, an amount that is not positive.
        DataError: a column that the training images do not have.
    """
    if royalties is not None and not 0 < royalties < float("inf"):
        raise ConfigError(f"royalties must be a positive amount, got {royalties}")
    manifest = manifest_of_scores(scores)
    explanations = load_explanations(scores, queries, top=top, data=data)
    config = manifest["config"]["scores"]
    page = html.Page(
        "Which training images made this?",
        f"{manifest['training_images']} training images{_left_out(manifest)}, "
        f"method {manifest['method']}, readout {config['readout']}",
    )
    page.section("How to read this", *_reading(manifest))
    page.section("Queries", *(b for item in explanations for b in explanation_blocks(item)))
    if manifest["copies"] is not None:
        page.section(
            "Beyond chance", *copy_section(manifest["copies"], _count(scores / "queries.parquet"))
        )
    page.section("Near copies", *near_copies(scores))
    shares = dict(manifest["groups"])
    for column in groups:
        if column not in shares:
            shares[column] = stored_shares(manifest, column, data)
    amount = manifest["config"]["royalties"] if royalties is None else royalties
    for column, records in shares.items():
        page.section(f"Shares by {column}", *group_section(column, records, amount))
    path = out or scores / "gallery.html"
    page.write(path)
    summary: dict[str, Any] = {"gallery": str(path), "queries": len(explanations)}
    if groups:
        summary["groups"] = {
            column: {
                record["name"]: round(record["share"] * (amount or 1), 4)
                for record in shares[column]
            }
            for column in groups
        }
    return summary


def load_explanations(
    scores: Path | str,
    queries: Sequence[str] = (),
    *,
    top: int = 10,
    data: str | None = None,
) -> list[Explanation]:
    """Queries with images and words, from finished scores; see :func:`explain_scores`."""
    import pyarrow.parquet as pq

    scores = Path(scores)
    manifest = manifest_of_scores(scores)
    for name, digest in manifest["files"].items():
        path = scores / name
        if not path.is_file() or sha256_file(path) != digest:
            raise ArtifactError(f"'{path}' is missing or damaged: run diffcal das score again")
    tables = {name: pq.read_table(scores / name).to_pylist() for name in manifest["files"]}
    order = {str(row["query"]): at for at, row in enumerate(tables["queries.parquet"])}
    unknown = [name for name in queries if name not in order]
    if unknown:
        raise ConfigError(
            f"'{unknown[0]}' was not scored; ids are {', '.join(list(order)[:5])} ..."
        )
    chosen = [order[name] for name in queries] or range(min(SHOWN, len(order)))
    training = _Pictures(manifest["data"], data)
    asked = _query_pictures(manifest["config"]["queries"])
    found = []
    for at in chosen:
        facts = dict(tables["queries.parquet"][at])
        query = facts["query"]
        listed = {
            name: sorted(
                (row for row in tables.get(f"{name}.parquet", ()) if row["query"] == query),
                key=lambda row: row["rank"],
            )[:top]
            for name in ("scores", "lowest", "nearest")
        }
        found.append(
            Explanation(
                query,
                facts["caption"],
                asked(at),
                tuple(
                    (training(row["training"]), training.words(row["training"], row))
                    for row in listed["scores"]
                ),
                tuple(
                    (training(row["training"]), training.words(row["training"], row))
                    for row in listed["lowest"]
                    if row["score"] < 0
                ),
                tuple(
                    (training(row["training"]), training.words(row["training"], row))
                    for row in listed["nearest"]
                ),
                {
                    key: facts[key]
                    for key in ("contributors", "dominance", "likeness", "isolation", "copy_score")
                },
            )
        )
    return found


def explanation_blocks(item: Explanation, size: int = 68) -> list[html.Html]:
    """One query as blocks of a page: the query, its contributors, opponents and neighbours."""
    title = f"{item.query}" + (f" · {item.caption}" if item.caption else "")
    query = html.image_grid(
        [item.image],
        [title],
        per_row=1,
        size=round(1.6 * size),
        caption=f"{item.facts['contributors']:.0f} effective contributors",
    )
    named = [("Most influential", item.top), ("Most opposing", item.lowest)]
    named.append(("Nearest in likeness", item.nearest))
    rows = "".join(
        html.image_grid(
            [image for image, _ in pictures],
            [words for _, words in pictures],
            per_row=10,
            size=size,
            caption=name,
        )
        for name, pictures in named
        if pictures
    )
    # The query keeps its place at the left of all its rows.
    left = f'<div style="flex:0 0 {round(1.6 * size)}px">{query}</div>'
    right = f'<div style="flex:1;min-width:0">{rows}</div>'
    style = "display:flex;gap:1.6rem;align-items:flex-start"
    return [html.Html(f'<div style="{style}">{left}{right}</div>')]


def _reading(manifest: dict[str, Any]) -> list[str | html.Html]:
    signed = manifest["config"]["scores"]["readout"] in ("signed", "signed_square")
    return [
        "Each query is shown with the training images whose removal is predicted to change most what "
        "the model makes of it, and with the training images that merely resemble it. Percentages "
        "are shares of the attribution to all training images."
        + (
            " Negative scores oppose: the model would make the query better without them."
            if signed
            else " The scores say how much an image matters, not whether it helps or harms."
        ),
        html.facts(
            {
                "queries' mean share of the first image": _percent(
                    manifest["summary"]["mean_top_share"]
                ),
                "effective contributors (median)": manifest["summary"]["median_contributors"],
                "first contributor among the nearest": _percent(
                    manifest["summary"]["first_is_near"]
                ),
            }
        ),
    ]


def near_copies(scores: Path, count: int = COPIES) -> list[str | html.Html]:
    """The queries with the largest copy scores as blocks of a page."""
    import pyarrow.parquet as pq

    rows = pq.read_table(scores / "queries.parquet").to_pylist()
    rows.sort(key=lambda row: -row["copy_score"])
    header = [
        "query",
        "copy score",
        "of image",
        "largest share",
        "nearest",
        "likeness",
        "isolation",
    ]
    judged = bool(rows) and "memorised" in rows[0]
    if judged:
        header += ["flags", "chance"]
    cells = [
        [
            str(row["query"]),
            row["copy_score"],
            str(row["copy_of"]),
            _percent(row["dominance"]),
            str(row["nearest"]),
            row["likeness"],
            row["isolation"],
            *([_flags(row), row["copy_chance"]] if judged else []),
        ]
        for row in rows[:count]
    ]
    return [
        "The copy score of a query is the largest product of attribution share and likeness over "
        "training images: near 1 only if one image dominates the query and resembles it. Isolation is "
        "how much nearer the nearest image is than the ones that follow it: 1 for a copy, 0 where it "
        "is as far as they are."
        + (
            " Flags say what is beyond held-out images; chance is the part of them whose copy score "
            "comes as far."
            if judged
            else ""
        ),
        html.table(header, cells),
    ]


def _flags(row: dict[str, Any]) -> str:
    named = ("near_copy", "dominated", "memorised")
    return ", ".join(name.replace("_", " ") for name in named if row[name]) or "none"


def _count(table: Path) -> int:
    import pyarrow.parquet as pq

    return pq.ParquetFile(table).metadata.num_rows


class _Pictures:
    """Training images as PNG by id, and words under them."""

    def __init__(self, data: dict[str, Any], name: str | None) -> None:
        self.source = open_images(
            name or data["name"],
            image_column=data["image_column"],
            label_column=data["label_column"],
        )
        self._cache: dict[int, tuple[bytes, int]] = {}

    def _load(self, row: int) -> tuple[bytes, int]:
        if row not in self._cache:
            _, images, labels = next(self.source.batches(1, [row]))
            self._cache[row] = (encode_png(images[0]), int(labels[0]))
        return self._cache[row]

    def __call__(self, row: int) -> bytes:
        return self._load(row)[0]

    def words(self, row: int, values: dict[str, Any]) -> str:
        parts = [f"#{row} · {self.source.class_names[self._load(row)[1]]}"]
        if "share" in values:
            parts.append(f"{100 * values['share']:.1f} %")
        elif "score" in values:
            parts.append(f"{values['score']:.2g}")
        if "likeness" in values:
            parts.append(f"cos {values['likeness']:.2f}")
        # Lines break between the parts only.
        return " ".join(part.replace(" ", "\u00a0") for part in parts)


def _query_pictures(queries: dict[str, Any]) -> Any:
    from diffcal.workflows.das_images import query_source

    source = query_source(queries["name"], queries["image_column"], queries["label_column"])

    def picture(at: int) -> bytes:
        _, images, _ = next(source.batches(1, [queries["first_row"] + at * queries["stride"]]))
        return encode_png(images[0])

    return picture


def manifest_of_scores(scores: Path) -> dict[str, Any]:
    """Manifest of finished scores.

    Raises:
        ArtifactError: there are none, or of another kind.
    """
    path = scores / "scores.json"
    if not path.exists():
        raise ArtifactError(f"'{scores}' holds no finished scores: run diffcal das score")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"'{path}' is not of format {FORMAT}")
    return manifest


def _left_out(manifest: dict[str, Any]) -> str:
    gone = len(manifest["config"].get("without", ()))
    return f" ({gone} left out)" if gone else ""


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
