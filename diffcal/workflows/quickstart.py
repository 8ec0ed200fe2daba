"""``diffcal quickstart``: the whole method on small digits, from bundled weights to a report."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffcal import __version__
from diffcal.core.runs import claim_folder, write_json
from diffcal.data.ladders import select_ladders
from diffcal.data.logits import load_logits
from diffcal.workflows import das, html
from diffcal.workflows.csm import CsmConfig, csm_config, run_csm
from diffcal.workflows.das_report import explanation_blocks, load_explanations, near_copies
from diffcal.workflows.das_score import QueryConfig, ScoreRunConfig, score_queries
from diffcal.workflows.previews import draw_ladder, draw_ratios
from diffcal.workflows.report import ReportConfig, report_data, report_model, report_sections
from diffcal.workflows.train_classifier import classifier_config, train_classifier

__all__ = ["quickstart"]

LADDERS = 6
ATTRIBUTED = 24
EXPLAINED = 3
"""Of the attributed digits every third one of the first dozen is shown."""
COMPARED = ("accuracy", "nll", "brier", "ece")

logger = logging.getLogger(__name__)


def quickstart(
    out: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    device: str = "cpu",
    mixing: Sequence[str] = (),
    training: Sequence[str] = (),
    attribution: Sequence[str] = (),
) -> dict[str, Any]:
    """Mix, annotate, train with and without the mixed images, attribute; write ``out/report.html``.

    Minutes on two CPU cores and no download: the denoiser comes with diffcal, the real images with
    scikit-learn. Interrupted and started again it goes on where it was.

    Args:
        out: Output folder.
        seed: Of noise, initial weights and batches.
        overwrite: Discard an earlier quickstart with other settings.
        device: Where networks compute.
        mixing: Overrides of the preset ``csm-digits``, as ``generate.plan.groups=45``.
        training: Overrides of the preset ``classifier-quickstart``.
        attribution: Overrides of the preset ``das-quickstart``.

    Returns:
        Paths of report and data set, headline figures of both classifiers, seconds of this call.

    Raises:
        ArtifactError: ``out`` holds something else, or a quickstart of another seed.
    """
    started = time.monotonic()
    claim = {"command": "quickstart", "seed": seed, "mixing": [*mixing], "training": [*training]}
    claim |= {"attribution": [*attribution]}
    claim_folder(out, claim, overwrite=overwrite)
    settings = [f"generate.seed={seed}", *mixing]
    csm = csm_config("digits", settings)
    logger.info("1 of 4: images between the digits, and how much of each digit they show")
    stages = run_csm(csm, out / "csm", device=device)
    dataset = out / "csm" / "dataset"

    logger.info("2 of 4: a small classifier on real images alone, and one on both")
    runs = {
        "real images": out / "classifier-real",
        "real and mixed images": out / "classifier-mixed",
    }
    folders = [None, str(dataset)]
    for folder, mixed in zip(runs.values(), folders, strict=True):
        overrides = [f"seed={seed}", *training] + ([f"mixed.folder={mixed}"] if mixed else [])
        train_classifier(classifier_config("quickstart", overrides), folder, device=device)

    logger.info("3 of 4: which training images the generated digits owe themselves to")
    scores = out / "das" / "scores"
    attributed = _attribute(csm, out, attribution, device)

    logger.info("4 of 4: the report")
    config = ReportConfig(title="diffcal quickstart", seed=seed)
    models = [
        report_model(name, load_logits(folder / "logits-test.safetensors"), config)
        for name, folder in runs.items()
    ]
    page = _page(dataset, scores, stages, models, config)
    page.write(out / "report.html")
    data = report_data(models, config)
    write_json(
        out / "report.json", {"mixing": stages, "calibration": data, "attribution": attributed}
    )
    figures = {
        model.name: {name: round(model.report[name].value, 4) for name in COMPARED}
        for model in models
    }
    return {
        "report": str(out / "report.html"),
        "dataset": str(dataset),
        "gallery": str(scores / "gallery.html"),
        "test": figures,
        "seconds": round(time.monotonic() - started, 1),
    }


def _attribute(csm: CsmConfig, out: Path, overrides: Sequence[str], device: str) -> dict[str, Any]:
    """Index the training images and score one image of each of some groups."""
    das.index(das.das_config("quickstart", overrides), out / "das", device=device)
    plan = csm.generate.plan
    # Groups start with a pure digit, so whole groups apart are digits and not mixtures.
    apart = max(1, plan.groups // ATTRIBUTED)
    config = ScoreRunConfig(
        queries=QueryConfig(
            name=str(out / "csm" / "generated"),
            rows=min(ATTRIBUTED, plan.groups),
            stride=apart * plan.members,
        ),
        top=10,
        nearest=5,
    )
    return score_queries(out / "das", config, device=device)


def _page(
    dataset: Path, scores: Path, stages: dict[str, Any], models: list[Any], config: Any
) -> html.Page:
    published = stages["publish"]
    page = html.Page(
        "diffcal quickstart",
        "Images between classes, their soft labels, and what a classifier makes of them",
        f"Made with diffcal {__version__}. The same on your own model and images: diffcal csm run, "
        "diffcal train-classifier, diffcal report.",
    )
    page.section(
        "From one digit to another",
        "Each row starts from one noise. The diffusion model was told to draw λ of the first digit and "
        "1 - λ of the second, at the λ, found by bisection, between which the image changes; λ̂ is how "
        "much of the first digit the finished image shows, measured afterwards in the model's own "
        "features; the bar is the soft label over all ten digits. The rows were drawn at random, not "
        "picked.",
        *(
            html.figure(draw_ladder(ladder), ladder.caption)
            for ladder in select_ladders(dataset, LADDERS)
        ),
    )
    statistics = published["statistics"]
    means = statistics["means"]
    page.section(
        "Asked for and found",
        "The ratio that the model was asked for is not what the image shows: it stays with one digit, "
        "passes to the other quickly, and sometimes shows a third one. This is why images are "
        "annotated after they are drawn.",
        html.facts(
            {
                "mixed images": published["images"],
                "mean entropy of a label (nats)": f"{means['entropy']:.3f}",
                "mean largest probability": f"{means['top_probability']:.3f}",
                "pure images recognised": _percent(means, "endpoint_ok"),
                "mass outside the mixed pair": f"{means['third_mass']:.3f}",
            }
        ),
        html.figure(
            draw_ratios(statistics, bisected=True),
            "Over all groups: mean and one standard deviation. Every group was asked for the ratios of "
            "its own passage, so that inner points hold different groups.",
        ),
    )
    page.section(
        "Which training images a digit owes itself to",
        "For each generated digit the training images whose removal is predicted to change most what "
        "the model makes of it (DAS), with their shares of all attribution, and the training images "
        "that resemble it most. An image can matter without resembling, and resemble without "
        "mattering.",
        *(
            block
            for item in load_explanations(scores, top=5)[::EXPLAINED]
            for block in explanation_blocks(item, size=64)
        ),
    )
    page.section("Near copies of training images", *near_copies(scores, 5))
    page.section(
        "With and without mixed images",
        "Two classifiers, the same but for the mixed images, on 360 digits of other writers. The test "
        "is small and this is one seed: read the intervals before the means.",
    )
    for title, blocks in report_sections(models, config, [str(digit) for digit in range(10)]):
        page.section(title, *blocks)
    return page


def _percent(means: dict[str, Any], name: str) -> str:
    value = means.get(name)
    return "none" if value is None else f"{100 * value:.1f} %"
