"""Figures in the README are those of the result files."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_tables_are_rows_of_their_files():
    blocks = re.findall(r"<!-- rows of (\S+) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert len(blocks) >= 2
    for name, block in blocks:
        lines = set((ROOT / name).read_text("utf-8").splitlines())
        for row in block.splitlines():
            assert row in lines, f"{name} has no row {row!r}"


def test_memory_figures():
    results = json.loads((ROOT / "benchmarks/memory.json").read_text("utf-8"))["results"]
    peaks = {entry["images"]: round(entry["generate_peak_mib"]) for entry in results}
    assert f"{peaks[100_000]} and {peaks[5_000]} MiB" in README


def test_files_that_it_names_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for script in re.findall(r"`(benchmarks/\w+\.py)`", README):
        assert (ROOT / script).exists(), script


def test_annotator_figures():
    results = json.loads((ROOT / "benchmarks/annotators_vs_humans.json").read_text("utf-8"))
    rows = results["results"]["classifier"]
    found = []
    for row in rows:
        if row["pairs"] == "human" and row["calibration"] == "hard":
            every, unsure = row["all"], row["unsure"]
            found.append(
                f"{every['kl_floor']:.3f} ± {every['se']['kl_floor']:.3f} | {every['tv']:.3f} | "
                f"{every['l2']:.3f} | {unsure['kl_floor']:.3f} |"
            )
    table = re.findall(r"^\| [^|]+ \| (\d\.\d+ ± .*)$", README, re.MULTILINE)
    assert len([line for line in table if line in found]) == 4
