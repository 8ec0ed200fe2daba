"""The CSM pipeline and the quickstart as a user runs them, on the bundled digits."""

import json
import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from datasets import load_dataset

from diffcal.cli import main
from diffcal.core.runs import sha256_file
from diffcal.diffusion.checkpoints import bundled_checkpoint, load_denoiser
from diffcal.errors import ArtifactError, CheckpointError
from diffcal.workflows.csm import csm_config, run_annotation, run_csm, run_publication
from diffcal.workflows.quickstart import quickstart

REPOSITORY = Path(__file__).parents[2]
SMALL = [
    "generate.plan.groups=3",
    "generate.plan.members=4",
    "generate.generation.sampler.steps=10",
    "annotation.real.rows=400",
]


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("DIFFCAL_PROGRESS", "0")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("csm")
    config = csm_config("digits", SMALL)
    return config, run, run_csm(config, run, device="cpu")


def test_the_data_set_opens_with_its_features(small_run, tmp_path):
    _, run, summary = small_run
    data = load_dataset(str(run / "dataset"), split="train", cache_dir=str(tmp_path))
    assert len(data) == 12 == summary["generate"]["images"]
    assert data.features["label"].names == [str(digit) for digit in range(10)]
    assert data[0]["image"].size == (8, 8)
    for row in data:
        assert abs(sum(row["soft_label"]) - 1) < 1e-5
        assert max(range(10), key=row["soft_label"].__getitem__) == row["label"]
    ends = [row for row in data if max(row["weights"]) == 1]
    assert len(ends) == 6
    hits = sum(row["label"] == row["classes"][row["weights"].index(1)] for row in ends)
    assert hits >= 5  # the denoiser draws the digits that it is asked for


def test_another_annotation_leaves_images_and_the_first_one(small_run):
    config, run, _ = small_run
    before = {p: sha256_file(p) for p in run.rglob("*.parquet") if "dataset" not in p.parts}
    other = csm_config("digits", [*SMALL, "annotation.annotator=projection_sigmoid"])
    summary = run_annotation(other, run, device="cpu")
    assert summary["encoded_now"] == 0
    assert {p: sha256_file(p) for p in before} == before
    with pytest.raises(ArtifactError, match="annotator"):
        run_publication(other, run)
    assert config.annotation.folder == "kclass_posterior"


def test_a_denoiser_at_hand_serves_instead_of_a_source(small_run, tmp_path):
    _, run, _ = small_run
    config = csm_config("digits", [*SMALL, "generate.model.source=nowhere"])
    denoiser = load_denoiser("bundled:digits")
    run_csm(config, str(tmp_path / "own"), denoiser=denoiser, device="cpu")
    files = sorted((run / "dataset").rglob("*.parquet"))
    assert files
    for path in files:
        assert sha256_file(tmp_path / "own" / path.relative_to(run)) == sha256_file(path)
    again = csm_config("digits", [*SMALL, "annotation.name=again"])
    summary = run_annotation(again, tmp_path / "own", denoiser=denoiser, device="cpu")
    assert summary["encoded_now"] == 0


def test_command_and_pipeline_file_write_the_same(small_run, tmp_path):
    _, run, _ = small_run
    arguments = ["run", "--preset", "digits", "--device", "cpu"]
    arguments += [f"--set={override}" for override in SMALL]
    outs = [tmp_path / "command", tmp_path / "pipeline"]
    assert main(["csm", *arguments, "--out", str(outs[0])]) == 0
    argv = sys.argv
    try:
        sys.argv = ["csm.py", *arguments, "--out", str(outs[1])]
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPOSITORY / "pipelines/csm.py"), run_name="__main__")
    finally:
        sys.argv = argv
    assert end.value.code == 0
    for path in sorted((run / "dataset").rglob("*.parquet")):
        for out in outs:
            assert sha256_file(out / path.relative_to(run)) == sha256_file(path)


def test_quickstart_writes_a_report_that_shows_and_tells(tmp_path):
    mixing = ["generate.plan.groups=9", "generate.plan.members=4", *SMALL[2:]]
    training = ["classifier.epochs=1", "rows=300"]
    attribution = ["data.rows=60", "features.timesteps=[500]", "features.projection.dim=128"]
    settings = {"mixing": mixing, "training": training, "attribution": attribution}
    summary = quickstart(tmp_path / "q", **settings)
    page = (tmp_path / "q/report.html").read_text("utf-8")
    headings = ("From one digit to another", "Asked for and found", "Reliability")
    for heading in (*headings, "Which training images a digit owes itself to", "Near copies"):
        assert heading in page
    # Three of the nine attributed digits are shown, each with five contributors and five neighbours.
    assert page.count("effective contributors") == 3
    assert page.count("data:image/png") >= 7 + 3 * 11
    # its ratios are bisected, which the report and the card of the data set say
    for text in (page, (tmp_path / "q/csm/dataset/README.md").read_text("utf-8")):
        assert "inner points hold different groups" in text
    assert "http://" not in page.replace("http://www.w3.org", "")
    data = json.loads((tmp_path / "q/report.json").read_text("utf-8"))
    assert [model["name"] for model in data["calibration"]["models"]] == [*summary["test"]]
    with pytest.raises(ArtifactError, match="seed"):
        quickstart(tmp_path / "q", seed=1, **settings)


@pytest.mark.parametrize(("name", "shape"), [("digits", (1, 8, 8)), ("cifar10", (3, 32, 32))])
def test_bundled_weights_are_what_their_card_says(name, shape):
    folder = bundled_checkpoint(name)
    denoiser = load_denoiser(f"bundled:{name}")
    assert denoiser.sample_shape == shape
    assert denoiser.num_classes == 10
    sha256 = sha256_file(folder / "model.safetensors")
    assert sha256 in (folder / "README.md").read_text("utf-8")
    index = tomllib.loads((REPOSITORY / "checkpoints/index.toml").read_text("utf-8"))
    assert index[name]["sha256"] == sha256


def test_unknown_bundled_weights():
    with pytest.raises(CheckpointError, match=r"no checkpoint 'faces'; it has cifar10, digits"):
        load_denoiser("bundled:faces")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "digit"], "unknown preset 'digit'; known: cifar10, digits"),
        (["--set", "generate.plan.group=3"], "did you mean 'groups'"),
        (["--set", "generate.model.source=nowhere"], "checkpoint 'nowhere' is missing"),
        (["--preset", "digits", "--set", 'generate.plan.only=[["1","x"]]'], "unknown class 'x'"),
        (["--preset", "digits", "--set", "annotation.real.name=gone.parquet"], "gone.parquet"),
    ],
)
def test_bad_settings_end_in_one_line(arguments, message, tmp_path, capsys):
    arguments = [*arguments, *(f"--set={override}" for override in SMALL)]
    status = main(["csm", "run", *arguments, "--device", "cpu", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    assert message in error
    assert error.startswith("diffcal: ")


def test_help_needs_no_heavy_imports():
    code = "import sys; from diffcal.cli import main\ntry:\n main(['csm', 'run', '--help'])\n"
    code += "except SystemExit:\n print(any(m in sys.modules for m in ('torch', 'numpy')))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip().endswith("False")
