"""The result of ``generation_quality.py`` as Markdown."""

from collections.abc import Iterator, Sequence
from typing import Any

SAMPLERS = {"fast": "fast, 13", "edm-18": "Heun, 35"}
READERS = {
    "classifier": "the independent classifier's features",
    "denoiser": "the denoiser's own features (the default of `diffcal csm`, not independent)",
}
LIKENESS = ("alike", "near_copy")
CONTROLS = ("noisy_training_images", "training_images_themselves")
BINS = ("0", *(f"{low / 10:.1f}–{low / 10 + 0.1:.1f}" for low in range(10)), "1")
KINDS = {
    "alike": "alike", "near_copy": "near copy", "dominated": "dominated", "memorised": "memorised",
}  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """All tables."""
    card, real, copies = result["checkpoint"], result["real"], result["copies"]
    seen = (
        "" if card["images_seen"] is None else f", trained on {card['images_seen']} images in all"
    )
    lines = [
        f"# Generation quality: {result['set_up']}",
        "",
        f"Written by `benchmarks/generation_quality.py`. Denoiser `{card['name']}` "
        f"({card['fingerprint'][:12]}, {card['parameters']} parameters{seen}), computing in "
        f"{card['dtype']}. Independent classifier: {result['classifier']}, "
        f"{_percent(real['accuracy'])} % of {real['held_out']} held-out real images right. "
        "95 % intervals in brackets; of Fréchet distances the smallest and largest part.",
        "",
    ]
    if result["failed"]:
        lines += [f"**Failed by the protocol's own criteria:** {'; '.join(result['failed'])}.", ""]
    lines += [*_pure(result), *_classes(result), *_ladders(result), *_curves(result)]
    lines += _copies(copies)
    return "\n".join([*lines, ""])


def _pure(result: dict[str, Any]) -> Iterator[str]:
    real, sizes, copies = result["real"], result["sizes"], result["copies"]
    yield "## Images of a single class"
    yield ""
    yield (
        f"{sizes['parts']} parts of {sizes['images']} images, all settings from the same noise. Bold: "
        "differs from the first row (paired interval without 0; for Fréchet distances one sign in all "
        f"parts). Features for the Fréchet distance: {real['feature_dim']} penultimate ones of the "
        f"classifier; floor: {real['floor_parts']} parts of as many real images that the denoiser was "
        "trained on and the classifier was not. CPU seconds are those of this machine under its load."
    )
    yield ""
    yield from _head(
        [
            "sampler, evaluations",
            "guidance",
            "recognised, %",
            "Fréchet distance",
            "alike to a training image, %",
            "network rows per image",
            "CPU s per 1 000",
        ]
    )
    near = {(row["preset"], row["scale"]): row["alike"] for row in copies["settings"]}
    for row in result["pure"]:
        fidelity, distance = _percent(row["fidelity"]), _plain(row["frechet"], 2)
        yield _row(
            SAMPLERS[row["preset"]],
            f"{row['scale']:g}",
            _bold(fidelity, row.get("fidelity_change")),
            _bold(distance, row.get("frechet_change")),
            _percent(near[row["preset"], row["scale"]]),
            str(row["rows_per_image"]),
            f"{row['cpu_seconds_per_1000']:.1f}",
        )
    yield _row(
        "real images",
        "",
        f"{_percent(real['accuracy'])} (held out)",
        f"{_plain(real['frechet_floor'], 2)} (floor)",
        f"{_percent(copies['held_out']['alike'])} (held out)",
        "",
        "",
    )
    yield ""


def _classes(result: dict[str, Any]) -> Iterator[str]:
    real = result["real"]["accuracy_by_class"]
    yield "Recognised by class, %:"
    yield ""
    yield from _head(["sampler", "guidance", *map(str, range(len(real)))])
    for row in result["pure"]:
        shares = (f"{100 * share:.0f}" for share in row["fidelity_by_class"])
        yield _row(SAMPLERS[row["preset"]], f"{row['scale']:g}", *shares)
    yield _row("held-out real", "", *(f"{100 * share:.0f}" for share in real))
    yield ""


def _ladders(result: dict[str, Any]) -> Iterator[str]:
    kinds = result["ladders"]["kinds"]
    yield "## Ladders between two classes"
    yield ""
    yield (
        f"{result['sizes']['groups']} groups of eight, all pairs in turn, `fast`, no guidance, the "
        "same noise for all kinds. Between: share of the inner images with λ̂ in [0.1, 0.9]; order: "
        "Spearman correlation of λ and λ̂ within a group; largest step: pixel distance of neighbours "
        "over that of the ends (0.14 at best). λ̂ by projection (`lambda_hat` of `diffcal csm`) and by "
        "the posterior of the pair. Bold: differs from `label` (paired interval over groups without 0)."
    )
    yield ""
    yield from _head(["kind", "largest step", "CPU s per 1 000"])
    for name, kind in kinds.items():
        yield _row(name, _measure(kind, "largest_step", 2), f"{kind['cpu_seconds_per_1000']:.1f}")
    yield ""
    for reader in _readers(result):
        passage = kinds["label"]["measures"]
        yield (
            f"With {READERS[reader]}; from one end to the other λ̂ rises by "
            f"{_plain(passage[f'{reader}/projection/passage'], 2)} by projection and "
            f"{_plain(passage[f'{reader}/posterior/passage'], 2)} by posterior (1: both ends show "
            "their class). Of the ends themselves, which show a single class, "
            f"{_percent(passage[f'{reader}/projection/ends_between'])} % and "
            f'{_percent(passage[f"{reader}/posterior/ends_between"])} % lie "between":'
        )
        yield ""
        yield from _head(
            [
                "kind",
                "between, projection, %",
                "between, posterior, %",
                "order, projection",
                "order, posterior",
                "third classes",
            ]
        )
        for name, kind in kinds.items():
            yield _row(
                name,
                _measure(kind, f"{reader}/projection/between", 1, 100),
                _measure(kind, f"{reader}/posterior/between", 1, 100),
                _measure(kind, f"{reader}/projection/spearman", 2),
                _measure(kind, f"{reader}/posterior/spearman", 2),
                _measure(kind, f"{reader}/third", 3),
            )
        yield ""


def _curves(result: dict[str, Any]) -> Iterator[str]:
    kinds = result["ladders"]["kinds"]
    yield "## λ̂ against the requested λ"
    yield ""
    yield (
        "Median [10 %, 90 %] of λ̂ over images, by requested λ; – where a kind asked for none. A "
        "bisection asks each group for ratios within its own passage, so that its columns hold "
        "different groups and do not form a curve."
    )
    yield ""
    for readout in ("projection", "posterior"):
        yield f"By {readout}, with {READERS['classifier']}:"
        yield ""
        yield from _head(["kind", *BINS])
        for name, kind in kinds.items():
            cells = ["–"] * len(BINS)
            for point in kind["curves"][f"classifier/{readout}"]:
                low, high = f"{point['q10']:.2f}", f"{point['q90']:.2f}"
                cells[_bin(point["lambda"])] = f"{point['median']:.2f} [{low}, {high}]"
            yield _row(name, *cells)
        yield ""


def _bin(requested: float) -> int:
    if requested <= 0:
        return 0
    return len(BINS) - 1 if requested >= 1 else 1 + min(int(requested * 10), 9)


def _copies(copies: dict[str, Any]) -> Iterator[str]:
    mirrored = " and their mirror images" if copies["mirrored"] else ""
    yield "## Near copies"
    yield ""
    yield (
        f"By the memorisation report of `diffcal das score`: cosine of centred pixels to "
        f"{copies['training_images']} training images{mirrored}, and isolation, by how much the nearest "
        "is nearer than the next 49 (1 less the ratio of their distances, 1 - cosine). Alike: likeness "
        f"beyond the {100 * copies['quantile']:g} % quantile of one half of the held-out images; near "
        "copy: isolation too. Held-out images are "
        "judged by their other half. Training images, noisy and as they are, are the positive control."
    )
    yield ""
    yield from _head(["images", "number", "median likeness", "alike, %", "near copy, %"])
    for row in copies["settings"]:
        yield _copy_row(f"{SAMPLERS[row['preset']]}, guidance {row['scale']:g}", row, LIKENESS)
    yield _copy_row("held-out real images", copies["held_out"], LIKENESS)
    for name in CONTROLS:
        yield _copy_row(name.replace("_", " "), copies[name], LIKENESS)
    yield ""
    if "attribution" in copies:
        found = copies["attribution"]
        yield (
            "By attribution (preset `das-digits`) and likeness: dominated is the share of the largest "
            "contributor, memorised that share times likeness, each beyond the same quantile."
        )
        yield ""
        names = [f"{name}, %" for name in KINDS.values()]
        yield from _head(["images", "number", "median likeness", *names, "median largest share"])
        for row in found["settings"]:
            yield _copy_row(
                f"{SAMPLERS[row['preset']]}, guidance {row['scale']:g}", row, list(KINDS)
            )
        yield _copy_row("held-out real images", found["held_out"], list(KINDS))
        for name in CONTROLS:
            yield _copy_row(name.replace("_", " "), found[name], list(KINDS))
        yield ""
        for name in CONTROLS:
            yield (
                f"Of {name.replace('_', ' ')} the largest contributor is the original for "
                f"{_percent(found[name]['top_is_original'])} %, and the largest share times likeness "
                f"is the original's for {_percent(found[name]['copy_of_original'])} %."
            )
        yield ""


def _copy_row(title: str, row: dict[str, Any], kinds: Sequence[str]) -> str:
    cells = [_percent(row[kind]) for kind in kinds]
    if "median_largest_share" in row:
        cells.append(f"{row['median_largest_share']:.4f}")
    return _row(title, str(row["images"]), f"{row['median_likeness']:.3f}", *cells)


def _readers(result: dict[str, Any]) -> list[str]:
    return list(result["ladders"]["annotators"])


def _measure(kind: dict[str, Any], name: str, digits: int, scale: float = 1) -> str:
    text = _plain(kind["measures"][name], digits, scale)
    return _bold(text, kind.get("changes", {}).get(name))


def _bold(text: str, change: Sequence[float] | None) -> str:
    return f"**{text}**" if change is not None and (change[1] > 0 or change[2] < 0) else text


def _percent(interval: Sequence[float]) -> str:
    return _plain(interval, 1, 100)


def _plain(interval: Sequence[float], digits: int, scale: float = 1) -> str:
    middle, low, high = (f"{scale * value:.{digits}f}" for value in interval)
    return f"{middle} [{low}, {high}]"


def _head(names: Sequence[str]) -> Iterator[str]:
    yield _row(*names)
    yield _row("---", *("---:" for _ in names[1:]))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
