"""The data set card: README.md with the metadata that data set hubs read."""

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["dataset_card"]

SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)
SHOWN_CLASSES = 200

COLUMNS = (
    ("image", "PNG"),
    ("label", "likeliest class of the soft label (`ClassLabel`)"),
    ("soft_label", "probability of every class, as the annotator sees the image"),
    ("id", "number of the image: group × members + member"),
    ("group", "images of a group share their noise and differ in the mixing weights"),
    ("member", "place in the group"),
    ("classes", "classes the image was mixed from"),
    ("weights", "their weights in the generator's condition"),
    ("lambda", "requested weight λ of the first class"),
    ("lambda_hat", "λ̂: that weight re-estimated from the image (pairs only)"),
    (
        "residual",
        "distance from the line between the classes; 1 is the 99th percentile of real images",
    ),
    ("third_mass", "probability of classes that were not mixed"),
    ("group_spearman", "rank correlation of λ and λ̂ within the group"),
    ("endpoint_ok", "whether an image of a single class is recognised as that class"),
    ("nearest_cosine", "cosine to the nearest real training image"),
    ("seed", "seed of the group's noise"),
)


def dataset_card(manifest: Mapping[str, Any]) -> str:
    """Markdown with a YAML header, the same text for the same manifest.

    Args:
        manifest: Content of a published data set's ``manifest.json``.
    """
    parts = [
        _header(manifest),
        _introduction(manifest),
        _ladders(manifest),
        _numbers(manifest),
        _ratios(manifest),
        _filters(manifest),
        _classes(manifest),
        _columns(),
        _limits(),
        _provenance(manifest),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(manifest: Mapping[str, Any]) -> str:
    count = manifest["images"]
    size = next((name for limit, name in SIZES if count < limit), "n>10M")
    return "\n".join(
        [
            "---",
            "pretty_name: Soft-labelled images between classes",
            "task_categories:",
            "- image-classification",
            "size_categories:",
            f"- {size}",
            "tags:",
            "- soft-labels",
            "- calibration",
            "- semantic-mixing",
            "- synthetic",
            "configs:",
            "- config_name: default",
            "  data_files:",
            "  - split: train",
            "    path: data/train-*.parquet",
            "---",
        ]
    )


def _introduction(manifest: Mapping[str, Any]) -> str:
    classes = len(manifest["class_names"])
    return f"""# Soft-labelled images between classes

{_count(manifest["images"])} generated images that lie between {classes} classes, each with a soft label.
A diffusion model was conditioned on mixtures of classes; an annotator then looked at each image and
said how much of every class it shows (calibration-aware semantic mixing, Luo et al. 2025,
[arXiv:2504.13548](https://arxiv.org/abs/2504.13548)). Trained beside real images, they teach a
classifier what a confidence between 0 and 1 looks like.

```python
from datasets import load_dataset

mixed = load_dataset("path/to/this/folder", split="train")
mixed[0]["image"], mixed[0]["soft_label"]
```

```python
from diffcal.data.soft_label_dataset import SoftLabelDataset

image, soft_label = SoftLabelDataset("path/to/this/folder")[0]  # [c, h, w], [{classes}]
```"""


def _ladders(manifest: Mapping[str, Any]) -> str:
    ladders = [p for p in manifest.get("previews", ()) if "ladder" in p["file"]]
    if not ladders:
        return ""
    lines = [
        "## From class to class",
        "",
        "Each row is one group: the same noise, with the weight λ of the first class falling from 1 to "
        "0. Under an image stand λ as requested, λ̂ as re-estimated from the image, and its soft label "
        "(grey: classes that were not mixed). Rows were not picked by looks: the first complete group "
        "stands for its classes, and the classes were drawn at random.",
    ]
    for preview in ladders:
        lines += ["", f"![{_plain(preview['caption'])}]({preview['file']})"]
    return "\n".join(lines)


def _numbers(manifest: Mapping[str, Any]) -> str:
    means = manifest["statistics"]["means"]
    rows = [
        ("images", _count(manifest["images"])),
        ("generated, before filtering", _count(manifest["generated"])),
        ("classes", _count(len(manifest["class_names"]))),
        ("images in a group", _count(manifest["members"])),
        ("mean entropy of the soft label (nats)", _number(means.get("entropy"))),
        ("mean largest probability", _number(means.get("top_probability"))),
        ("mean mass of the two largest", _number(means.get("top_two_probability"))),
        ("mean mass outside the mixed classes", _number(means.get("third_mass"))),
        ("mean off-axis residual", _number(means.get("residual"))),
        (
            "images of groups in order (Spearman of λ and λ̂ ≥ 0.8)",
            _share(means, "in_ordered_group"),
        ),
        ("single-class images recognised", _share(means, "endpoint_ok")),
        ("mean cosine to the nearest real image", _number(means.get("nearest_cosine"))),
    ]
    known = [row for row in rows if row[1]]
    return "## In numbers\n\n" + _table(("", ""), known)


def _ratios(manifest: Mapping[str, Any]) -> str:
    statistics = manifest["statistics"]
    rows = [
        (
            f"{row['ratio']:.3f}",
            _count(row["images"]),
            _with_spread(row),
            f"{row['first_class_probability']:.3f}",
            f"{row['entropy']:.3f}",
        )
        for row in statistics["ratios"]
    ]
    names = ("λ requested", "images", "λ̂ (mean ± sd)", "label of first class", "entropy")
    picture = next(
        (p for p in manifest.get("previews", ()) if p["file"].endswith("ratios.png")), None
    )
    text = "## Requested and re-estimated ratio\n\n"
    if statistics["ratio_rows"] == "tenths":
        text += "The ratio takes many values between the groups; rows gather tenths of it.\n\n"
    text += _table(names, rows)
    return text + (f"\n\n![{picture['caption']}]({picture['file']})" if picture else "")


def _filters(manifest: Mapping[str, Any]) -> str:
    active = {
        name: value
        for name, value in manifest["filter"].items()
        if value is not None and value is not False
    }
    if not active:
        return "## Filters\n\nNone: every generated image is here, with its quality columns."
    rows = [
        (f"`{name}`", str(value), _count(manifest["dropped"].get(name, 0)))
        for name, value in active.items()
    ]
    removed = manifest["generated"] - manifest["images"]
    return (
        "## Filters\n\n"
        + _table(("threshold", "value", "images refused"), rows)
        + f"\n\n{_count(removed)} of {_count(manifest['generated'])} images were left out; an image may "
        "be refused by several thresholds."
    )


def _classes(manifest: Mapping[str, Any]) -> str:
    statistics, names = manifest["statistics"], manifest["class_names"]
    picture = next(
        (p for p in manifest.get("previews", ()) if p["file"].endswith("classes.png")), None
    )
    text = "## Classes\n\n" + (f"![{picture['caption']}]({picture['file']})\n\n" if picture else "")
    values = list(
        zip(names, statistics["images_per_class"], statistics["mass_per_class"], strict=True)
    )
    rows = [
        (str(index), _plain(name), _count(images), f"{mass:.1f}")
        for index, (name, images, mass) in enumerate(values[:SHOWN_CLASSES])
    ]
    text += _table(("label", "class", "images (likeliest class)", "label mass"), rows)
    more = len(values) - len(rows)
    return text + (f"\n\n{more} more classes are listed in `manifest.json`." if more else "")


def _columns() -> str:
    return "## Columns\n\n" + _table(
        ("column", "content"), [(f"`{name}`", text) for name, text in COLUMNS]
    )


def _limits() -> str:
    return """## Limits

- Images are synthetic and inherit what the diffusion model and its training images lack.
- Soft labels are an annotator's estimates, not human judgements. An annotator fitted on real images has
  seen almost only pure ones: in the middle between classes its labels are extrapolated.
- A requested λ is not a confidence: use `soft_label`, not `lambda`, as the target."""


def _provenance(manifest: Mapping[str, Any]) -> str:
    provenance = manifest["provenance"]
    rows = [
        ("annotator", f"`{_plain(str(manifest['annotator']))}`"),
        ("encoder", _inline(provenance.get("encoder"))),
        ("denoiser", _inline(provenance.get("denoiser"))),
        ("versions", _inline(provenance.get("versions"))),
        ("shard hashes", "`manifest.json`"),
    ]
    text = "## Provenance\n\n" + _table(("", ""), [row for row in rows if row[1]])
    if provenance.get("config"):
        settings = json.dumps(provenance["config"], indent=2, ensure_ascii=False)
        text += (
            "\n\n<details><summary>Settings of the generation</summary>\n\n```json\n"
            f"{settings}\n```\n\n</details>"
        )
    return text


def _table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [names, tuple("---" for _ in names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _with_spread(row: Mapping[str, Any]) -> str:
    if row["estimate_mean"] is None:
        return ""
    mean = round(row["estimate_mean"], 3) + 0.0  # no negative zero
    return f"{mean:.3f} ± {row['estimate_sd']:.3f}".replace("-", "−")


def _share(means: Mapping[str, Any], name: str) -> str:
    value = means.get(name)
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _count(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def _inline(value: Any) -> str:
    if value in (None, {}, ""):
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{_plain(str(key))} {_plain(str(item))}" for key, item in value.items())
    return f"`{_plain(str(value))}`"


def _plain(text: str) -> str:
    """Text that does not break a table or a link."""
    return text.replace("|", "/").replace("`", "'").replace("[", "(").replace("]", ")")
