"""The ``diffcal`` command: flags in, stages called, one summary out.

Nothing heavy is imported before a handler runs, so ``diffcal --help`` answers at once.
"""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffcal import __version__
from diffcal.errors import DiffcalError

__all__ = ["main"]

Handler = Callable[[argparse.Namespace], Any]


def main(argv: list[str] | None = None) -> int:
    """Exit status of the command line ``argv`` (default: the process's own arguments).

    Errors that diffcal raises on purpose are printed in one line and give status 2; anything else
    keeps its traceback.
    """
    # Threads of small networks spend their time waiting for each other. Waiting actively, as OpenMP
    # does by default, costs ten times the work itself when other processes want the cores too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="%(name)s: %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("httpx", "datasets", "filelock", "urllib3", "fsspec", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        summary = args.handler(args)
    except DiffcalError as error:
        sys.stderr.write(f"diffcal: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("diffcal: interrupted; run the same command again to continue\n")
        return 130
    if summary is not None and _is_main_process():
        text = json.dumps(summary, indent=2, ensure_ascii=False, default=str)
        sys.stdout.write(_rows_on_one_line(text) + "\n")
    return 0


def _rows_on_one_line(text: str) -> str:
    """Indented JSON with its innermost lists on one line each; the same value."""
    # Line breaks never stand within strings of JSON, so that those that match are between items.
    return re.sub(
        r"\[\n\s+([^\[\]{}]*)\n\s+\]",
        lambda match: "[" + re.sub(r"\n\s+", " ", match[1]) + "]",
        text,
    )


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffcal",
        description="Calibrated classifiers and training-data attribution with diffusion models.",
    )
    parser.add_argument("--version", action="version", version=f"diffcal {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log details to stderr")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    quick = _add(
        commands, "quickstart", "the whole method on small digits, in minutes", _quickstart
    )
    quick.add_argument("--out", type=Path, default=Path("quickstart"), help="output folder")
    quick.add_argument("--seed", type=int, default=0)
    quick.add_argument("--overwrite", action="store_true", help="start again in a used folder")

    csm = _group(commands, "csm", "generate and annotate images that lie between classes")
    csm_flags: dict[str, Any] = {
        "presets": ("digits", "cifar10"),
        "example": "generate.plan.groups=100",
        "seed": "short for --set generate.seed=N",
    }
    _run_flags(_add(csm, "run", "plan, generate, annotate, publish", _csm_run), **csm_flags)
    _run_flags(_add(csm, "generate", "only generate (resumes)", _csm_generate), **csm_flags)
    annotate = _add(
        csm, "annotate", "annotate generated images again, without regenerating", _annotate
    )
    annotate.add_argument("run", type=Path, help="folder of diffcal csm")
    annotate.add_argument("--overwrite", action="store_true", help="replace other settings' labels")
    _config_flags(annotate, ("digits", "cifar10"), example="annotation.name=again", seed=None)
    _device_flag(annotate)
    publish = _add(csm, "publish", "write the soft-labelled data set of a run", _publish)
    publish.add_argument("run", type=Path, help="folder of diffcal csm")
    publish.add_argument(
        "--overwrite", action="store_true", help="replace other settings' data set"
    )
    _config_flags(
        publish, ("digits", "cifar10"), example="filter.require_endpoints=true", seed=None
    )
    export = _add(
        csm, "export-webdataset", "convert a published data set to tar shards", _webdataset
    )
    export.add_argument("dataset", type=Path, help="published data set folder")
    export.add_argument("--out", type=Path, required=True)
    export.add_argument("--shard-size", type=int, default=1000, help="images per tar file")

    das = _group(commands, "das", "which training images a generated image owes itself to")
    methods = (
        *(
            "das",
            "das-signs",
            "das-mean",
            "das-official",
            "dtrak",
            "trak",
            "journey-trak",
            "tracincp",
            "gas",
        ),
        *("relative-influence", "renormalised-influence", "ekfac"),
        *("gradient-dot", "gradient-cosine"),
        *("pixel-dot", "pixel-cosine", "encoder-dot", "encoder-cosine"),
        *("empirical-influence", "datamodel", "digits"),
    )
    index = _add(das, "index", "features of all training images (resumes)", _das_index)
    index.add_argument(
        "--model",
        action="append",
        default=[],
        help="checkpoint folder or hub name; short for --set model.source=. Repeatable: scores of "
        "several models are averaged",
    )
    index.add_argument("--data", help="its training images; short for --set data.name=")
    _run_flags(
        index,
        methods,
        example="features.projection.dim=1024",
        seed="short for --set features.noise_seed=N and features.projection.seed=N",
    )
    score = _add(das, "score", "most influential training images of each query", _das_score)
    score.add_argument("--index", type=Path, required=True, help="folder of diffcal das index")
    score.add_argument(
        "--queries",
        required=True,
        help="run of diffcal csm, its generated/ or dataset/, labelled images, or image files",
    )
    score.add_argument("--top", type=int, help="training images to list for each query (20)")
    score.add_argument("--rows", type=int, help="only the first so many queries")
    score.add_argument(
        "--unconditional", action="store_true", help="through the branch without a class"
    )
    score.add_argument(
        "--held-out",
        metavar="IMAGES",
        help="real images that the model was not trained on, which tell what is no copy; rest: those "
        "of the training source",
    )
    score.add_argument(
        "--without",
        nargs="+",
        action="extend",
        default=[],
        metavar="ID_OR_FILE",
        help="score as if the index did not hold these training images: ids (the column training of "
        "scores.parquet), or text files of ids, one on each line",
    )
    _group_flags(score)
    score.add_argument("--model", help="where the index's model is now, if it moved")
    score.add_argument("--data", help="where its training images are now, if they moved")
    score.add_argument("--out", type=Path, help="output folder (INDEX/scores)")
    score.add_argument("--config", type=Path, help="TOML file with settings")
    score.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override, as scores.readout=signed",
    )
    _device_flag(score)
    score.add_argument("--overwrite", action="store_true", help="replace other scores there")
    score.add_argument("--dry-run", action="store_true", help="print the settings and stop")
    _run_flags(
        _add(das, "lds", "train on random subsets and see whether scores predict it", _das_lds),
        presets=("digits",),
        example="subsets.count=16",
    )
    counterfactual = _add(
        das,
        "counterfactual",
        "retrain without the most influential images and compare",
        _das_counterfactual,
    )
    counterfactual.add_argument(
        "--scores",
        type=Path,
        action="append",
        default=[],
        help="folder of diffcal das score whose queries come from diffcal csm; repeatable to compare "
        "methods. Without it the model of a preset is trained",
    )
    counterfactual.add_argument("--remove", type=int, help="short for --set remove=N")
    _run_flags(
        counterfactual,
        ("digits",),
        example="training.optimizer.steps=300",
        seed="of noise and random removals; short for --set seed=N",
    )
    explain = _add(das, "explain", "a page with some queries and the images behind them", _explain)
    explain.add_argument("scores", type=Path, help="folder of diffcal das score")
    explain.add_argument("--query", action="append", default=[], help="id of a query; repeatable")
    explain.add_argument("--top", type=int, default=10, help="training images to show for each")
    _group_flags(explain)
    explain.add_argument("--data", help="where the training images are now, if they moved")
    explain.add_argument("--out", type=Path, help="file to write (SCORES/gallery.html)")

    _run_flags(
        _add(commands, "train-diffusion", "train a class-conditional denoiser", _train_diffusion),
        presets=("digits", "cifar10"),
        example="optimizer.steps=1000",
    )
    _run_flags(
        _add(
            commands,
            "train-classifier",
            "train a classifier on real and mixed data",
            _train_classifier,
        ),
        presets=("digits", "cifar10"),
        example="classifier.epochs=10",
    )

    checkpoints = _group(commands, "checkpoints", "model files")
    imports = _add(checkpoints, "import", "convert an EDM pickle without running it", _import)
    imports.add_argument("file", type=Path)
    imports.add_argument("--out", type=Path, required=True)
    imports.add_argument("--sha256", help="refuse the file unless it has this hash")
    imports.add_argument("--class-names", help="comma-separated names, in label order")
    show = _add(checkpoints, "show", "what a checkpoint holds", _show)
    show.add_argument("source", help="checkpoint folder or hub name")

    calibrate = _add(
        commands,
        "calibrate",
        "fit post-hoc methods on validation logits and apply them",
        _calibrate,
    )
    calibrate.add_argument(
        "--logits", type=Path, required=True, help="validation file: .npz, .parquet, .safetensors"
    )
    calibrate.add_argument(
        "--apply", type=Path, nargs="+", required=True, help="files to calibrate and to measure"
    )
    calibrate.add_argument(
        "--method",
        action="append",
        default=[],
        help="as temperature (the default), consistency or feature_clipping+temperature; repeatable",
    )
    calibrate.add_argument("--out", type=Path, required=True, help="output folder")
    calibrate.add_argument("--config", type=Path, help="TOML file with settings")
    calibrate.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override, as n_bins=20 or temperature.search=grid",
    )
    calibrate.add_argument("--overwrite", action="store_true", help="discard what the folder holds")
    calibrate.add_argument("--dry-run", action="store_true", help="print the settings and stop")

    report = _add(commands, "report", "calibration report of one or several logits files", _report)
    report.add_argument("logits", type=Path, nargs="+", help=".npz, .parquet or .safetensors")
    report.add_argument("--out", type=Path, required=True, help="folder for report.html and .json")
    return parser


def _group(commands: Any, name: str, text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=text)
    return parser.add_subparsers(dest=f"{name}_command", required=True, metavar="COMMAND")


def _add(commands: Any, name: str, text: str, handler: Handler) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(handler=handler)
    return parser


def _group_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--groups",
        action="append",
        default=[],
        metavar="COLUMN",
        help="share attribution out by this column of the training images, as artist; repeatable",
    )
    parser.add_argument(
        "--royalties", type=float, metavar="AMOUNT", help="divide this among the groups"
    )


def _config_flags(
    parser: argparse.ArgumentParser,
    presets: tuple[str, ...],
    *,
    example: str,
    seed: str | None = "short for --set seed=N",
) -> None:
    names = f"one of {', '.join(presets)}; settings come from it first"
    parser.add_argument("--preset", help=names)
    parser.add_argument("--config", type=Path, help="TOML file with settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"override, as {example}"
    )
    if seed is not None:
        parser.add_argument("--seed", type=int, help=seed)
    parser.add_argument("--dry-run", action="store_true", help="print the settings and stop")


def _device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def _run_flags(
    parser: argparse.ArgumentParser,
    presets: tuple[str, ...],
    *,
    example: str,
    seed: str = "short for --set seed=N",
) -> None:
    _config_flags(parser, presets, example=example, seed=seed)
    _device_flag(parser)
    parser.add_argument(
        "--out", type=Path, required=True, help="output folder; resumes what it holds"
    )
    parser.add_argument("--overwrite", action="store_true", help="discard what the folder holds")


def _build(cls: type, args: argparse.Namespace, kind: str, seed: str = "seed") -> Any:
    """Config of ``cls`` from ``presets/KIND-NAME.toml``, ``--config`` and the overrides.

    ``seed`` is the setting that ``--seed`` is short for.
    """
    from diffcal.workflows.preset_files import preset_config

    overrides = list(args.set)
    if getattr(args, "seed", None) is not None:
        overrides.append(f"{seed}={args.seed}")
    return preset_config(cls, kind, args.preset, overrides, file=args.config)


def _dry(config: Any) -> dict[str, Any]:
    from diffcal.config import config_to_dict

    return config_to_dict(config)


def _quickstart(args: argparse.Namespace) -> Any:
    from diffcal.workflows.quickstart import quickstart

    return quickstart(args.out, seed=args.seed, overwrite=args.overwrite)


def _csm_run(args: argparse.Namespace) -> Any:
    from diffcal.workflows.csm import CsmConfig, run_csm

    config = _build(CsmConfig, args, "csm", "generate.seed")
    if args.dry_run:
        return _dry(config)
    return run_csm(config, args.out, device=args.device, overwrite=args.overwrite)


def _csm_generate(args: argparse.Namespace) -> Any:
    from diffcal.workflows.csm import CsmConfig, run_generation

    config = _build(CsmConfig, args, "csm", "generate.seed")
    if args.dry_run:
        return _dry(config)
    return run_generation(config, args.out, device=args.device, overwrite=args.overwrite)


def _annotate(args: argparse.Namespace) -> Any:
    from diffcal.workflows.csm import CsmConfig, run_annotation

    config = _build(CsmConfig, args, "csm", "generate.seed")
    if args.dry_run:
        return _dry(config)
    return run_annotation(config, args.run, device=args.device, overwrite=args.overwrite)


def _publish(args: argparse.Namespace) -> Any:
    from diffcal.workflows.csm import CsmConfig, run_publication

    config = _build(CsmConfig, args, "csm", "generate.seed")
    if args.dry_run:
        return _dry(config)
    return run_publication(config, args.run, overwrite=args.overwrite)


def _webdataset(args: argparse.Namespace) -> Any:
    from diffcal.data.webdataset import export_webdataset

    paths = export_webdataset(args.dataset, args.out, shard_size=args.shard_size)
    return {"out": str(args.out), "shards": len(paths)}


def _das_index(args: argparse.Namespace) -> Any:
    from diffcal.workflows import das

    overrides = list(args.set)
    if len(args.model) == 1:
        overrides.append(f"model.source={json.dumps(args.model[0])}")
    elif args.model:
        overrides.append(f"models={json.dumps(args.model)}")
    if args.data is not None:
        overrides.append(f"data.name={json.dumps(args.data)}")
    if args.seed is not None:
        overrides += [f"features.noise_seed={args.seed}", f"features.projection.seed={args.seed}"]
    config = das.das_config(args.preset, overrides, file=args.config)
    if args.dry_run:
        return _dry(config)
    return das.index(config, args.out, device=args.device, overwrite=args.overwrite)


def _das_score(args: argparse.Namespace) -> Any:
    from diffcal.workflows import das
    from diffcal.workflows.das_score import score_queries
    from diffcal.workflows.das_without import read_ids

    overrides = list(args.set)
    for key, value in (("top", args.top), ("queries.rows", args.rows)):
        if value is not None:
            overrides.append(f"{key}={value}")
    if args.unconditional:
        overrides.append("queries.unconditional=true")
    if args.held_out is not None:
        overrides.append(f"held_out.name={json.dumps(args.held_out)}")
    if args.groups:
        overrides.append(f"groups={json.dumps(args.groups)}")
    if args.royalties is not None:
        overrides.append(f"royalties={args.royalties}")
    if args.without:
        overrides.append(f"without={read_ids(args.without)}")
    config = das.score_config(args.index, args.queries, overrides, file=args.config)
    if args.dry_run:
        return _dry(config)
    return score_queries(
        args.index,
        config,
        args.out,
        model=args.model,
        data=args.data,
        device=args.device,
        overwrite=args.overwrite,
    )


def _das_lds(args: argparse.Namespace) -> Any:
    from diffcal.workflows.das_lds import run_lds
    from diffcal.workflows.das_lds_config import LdsConfig

    config = _build(LdsConfig, args, "lds")
    if args.dry_run:
        return _dry(config)
    return run_lds(config, args.out, device=args.device, overwrite=args.overwrite)


def _das_counterfactual(args: argparse.Namespace) -> Any:
    from diffcal.workflows.das_counterfactual import run_counterfactual
    from diffcal.workflows.das_counterfactual_config import counterfactual_config

    overrides = list(args.set)
    for key, value in (("remove", args.remove), ("seed", args.seed)):
        if value is not None:
            overrides.append(f"{key}={value}")
    config = counterfactual_config(args.preset, args.scores, overrides, file=args.config)
    if args.dry_run:
        return _dry(config)
    return run_counterfactual(config, args.out, device=args.device, overwrite=args.overwrite)


def _explain(args: argparse.Namespace) -> Any:
    from diffcal.workflows.das_report import explain_scores

    return explain_scores(
        args.scores,
        args.query,
        top=args.top,
        out=args.out,
        data=args.data,
        groups=args.groups,
        royalties=args.royalties,
    )


def _train_diffusion(args: argparse.Namespace) -> Any:
    from diffcal.workflows.train_diffusion import TrainDiffusionConfig, train_diffusion

    config = _build(TrainDiffusionConfig, args, "diffusion")
    if args.dry_run:
        return _dry(config)
    return train_diffusion(config, args.out, overwrite=args.overwrite, device=args.device)


def _train_classifier(args: argparse.Namespace) -> Any:
    from diffcal.workflows.train_classifier import TrainClassifierConfig, train_classifier

    config = _build(TrainClassifierConfig, args, "classifier")
    if args.dry_run:
        return _dry(config)
    return train_classifier(config, args.out, overwrite=args.overwrite, device=args.device)


def _import(args: argparse.Namespace) -> Any:
    from diffcal.workflows.import_checkpoint import run

    names = tuple(args.class_names.split(",")) if args.class_names else None
    return run(args.file, args.out, sha256=args.sha256, class_names=names)


def _show(args: argparse.Namespace) -> Any:
    from diffcal import load_denoiser

    denoiser = load_denoiser(args.source)
    return {
        "source": args.source,
        "kind": type(denoiser).__name__,
        "sample_shape": list(denoiser.sample_shape),
        "condition": denoiser.condition_kind,
        "classes": list(denoiser.class_names),
        # JSON has no infinity, so it is spelled out as in checkpoints' config.json.
        "sigma": [
            s if s < float("inf") else "inf" for s in (denoiser.sigma_min, denoiser.sigma_max)
        ],
        "parameters": sum(p.numel() for p in denoiser.module.parameters()),
        "fingerprint": denoiser.fingerprint,
    }


def _calibrate(args: argparse.Namespace) -> Any:
    from diffcal.workflows.calibrate import calibrate, calibrate_config

    config = calibrate_config(args.method, args.set, args.config)
    if args.dry_run:
        return _dry(config)
    return calibrate(config, args.logits, args.apply, args.out, overwrite=args.overwrite)


def _report(args: argparse.Namespace) -> Any:
    from diffcal.workflows.report import calibration_report

    calibration_report(args.logits, args.out)
    return {"report": str(args.out / "report.html"), "data": str(args.out / "report.json")}
