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


def test_tables_hold_cells_of_their_files():
    """A shorter table: every cell stands in a row of that name in the file."""
    blocks = re.findall(r"<!-- cells of (\S+) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert blocks
    for name, block in blocks:
        cells: dict[str, set[str]] = {}
        for line in (ROOT / name).read_text("utf-8").splitlines():
            first, *others = _cells(line)
            cells.setdefault(first, set()).update(others)
        for row in block.splitlines()[2:]:
            method, *figures = _cells(row)
            for figure in figures:
                assert figure in cells[method], f"{name}: {method} has no {figure!r}"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


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


def test_speed_figures():
    sizes = {"1 000 000 × 10": "1000000x10", "50 000 × 1 000": "50000x1000"}
    results = json.loads((ROOT / "benchmarks/metrics_speed.json").read_text("utf-8"))
    for shown, size in sizes.items():
        ratios = results[size]["ratios"]
        netcal = ratios["netcal_over_ours_from_logits"]["cpu"]
        torchmetrics = ratios["torchmetrics_over_ours"]["cpu"]
        row = (
            f"{shown} logits | 1 | {netcal:.1f} times our time | {torchmetrics:.1f} times our time"
        )
        assert f"| same measures, {row} |" in README
    name = "netcal_over_ours_from_probabilities"
    two = json.loads((ROOT / "benchmarks/metrics_speed_two_cores.json").read_text("utf-8"))
    one = [results[size]["ratios"][name]["cpu"] for size in sizes.values()]
    both = [two[size]["ratios"][name]["clock"] for size in sizes.values()]
    text = " ".join(README.split())
    assert "it takes {:.1f} and {:.1f} times our time".format(*one) in text
    assert "and {:.1f} and {:.1f} by the clock on two cores".format(*both) in text
    name = "netcal_over_ours_from_logits"
    both = [two[size]["ratios"][name]["clock"] for size in sizes.values()]
    assert "from logits {:.1f} and {:.1f} ([metrics_speed_two_cores".format(*both) in text
    losses = json.loads((ROOT / "benchmarks/losses_speed_avx2.json").read_text("utf-8"))
    ends = {}
    for kind, rows in losses["1000000x10"].items():
        others = {"torch", "mdca", "dca", "dual_focal", "dual_focal_gra"}
        pointwise = [row["ratio"] for name, row in rows.items() if name not in others]
        ends[kind] = min(pointwise), max(pointwise)
    assert "they take {:.2f} to {:.1f} times of it with hard labels".format(*ends["hard"]) in text
    assert "{:.2f} to {:.1f} with soft ones".format(*ends["soft"]) in text
    assert f"up to {ends['mixed'][1]:.1f} with mixed ones" in text
    kernel = json.loads((ROOT / "benchmarks/attribution_kernel.json").read_text("utf-8"))
    assert f"{kernel['kernel']['seconds']:.0f} s on two cores" in README
    gradients = json.loads((ROOT / "benchmarks/gradient_speed.json").read_text("utf-8"))
    for method in ("sketched", "exact_sjlt"):
        assert f"{gradients['over_step'][method]['median']:.2f}" in README
    outputs = json.loads((ROOT / "benchmarks/gradient_speed_outputs.json").read_text("utf-8"))
    part = {name: values["median"] for name, values in outputs["over_step"].items()}
    assert "cost {outputs:.2f}, no more than a forward pass ({forward:.2f};".format(**part) in text
    assert "cost {sketched:.2f} and exact ones {exact_sjlt:.2f})".format(**part) in text
    peers = json.loads((ROOT / "benchmarks/attribution_peers.json").read_text("utf-8"))["results"]
    for shown, columns in (("512", "512"), ("4 096", "4096")):
        ratio = {
            name: peers[columns][name]["over_sketched"] for name in ("traker", "dattri_normal")
        }
        row = (
            f"| features and scores, {shown} columns | 1 | {ratio['traker']:.1f} times our time | "
            f"{ratio['dattri_normal']:.1f} times our time |"
        )
        assert row in README
    half = [peers["4096"][name]["over_sjlt_half"] for name in ("traker", "dattri_normal")]
    row = "| the same, ours in bfloat16 with SJLT | 1 | {:.1f} times our time | {:.1f} times our time |"
    assert row.format(*half) in README
    path = ROOT / "benchmarks/attribution_peers_default.json"
    found = json.loads(path.read_text("utf-8"))["results"]["4096"]
    both = [found[name]["over_das"] for name in ("traker", "dattri_normal")]
    row = "| the default `das`, 4 096 columns | 1 | {:.1f} times our time | {:.1f} times our time |"
    assert row.format(*both) in README
    fidelity = found["das"]["fidelity"]["pearson_mean"]
    assert f"comes to {fidelity:.3f} of the exact scores of its own kernel" in text
    posthoc = json.loads((ROOT / "benchmarks/posthoc_speed.json").read_text("utf-8"))
    ten, thousand = posthoc["1000000x10"], posthoc["50000x1000"]
    law = "consistency_gaussian"
    both = {f"{size['ratios'][law]['processor']:.1f}" for size in (ten, thousand)}
    assert len(both) == 1
    shown = f"takes {both.pop()} times our temperature scaling at 10 classes and at 1 000, without"
    assert shown in text
    for name, kind, shown in (
        ("alone", "processor", "the other methods {:.1f} and {:.1f} ([posthoc"),
        ("two_cores", "clock", "on two cores {:.1f} and {:.1f} by the clock,"),
        ("two_cores", "processor", "{:.1f} and {:.1f} in processor time ([posthoc"),
    ):
        path = ROOT / f"benchmarks/posthoc_speed_{name}.json"
        found = json.loads(path.read_text("utf-8"))
        both = [found[size]["ratios"][law][kind] for size in sizes.values()]
        assert shown.format(*both) in text
    law = "consistency_uniform"
    path = ROOT / "benchmarks/posthoc_speed_uniform.json"
    other = json.loads(path.read_text("utf-8"))["1000000x10"]
    both = [one["ratios"][law]["processor"] for one in (ten, other)]
    shown = (
        "Uniform noise takes {:.1f} times at 10 classes, and {:.1f} on the processor with AVX-512"
    )
    assert shown.format(*both) in text
    path = ROOT / "benchmarks/metrics_speed_avx2.json"
    avx2 = [json.loads(path.read_text("utf-8"))[size]["ratios"] for size in sizes.values()]
    for name, shown in (
        ("torchmetrics_over_ours", "torchmetrics takes {:.1f} and {:.1f} times our time,"),
        ("netcal_over_ours_from_probabilities", "netcal {:.1f} and {:.1f} from probabilities"),
        ("netcal_over_ours_from_logits", "{:.1f} and {:.1f} from logits. Pointwise"),
    ):
        assert shown.format(*(ratios[name]["cpu"] for ratios in avx2)) in text


def test_cifar10_control_figures():
    name = "benchmarks/csm_controls_cifar10_converged.json"
    runs = json.loads((ROOT / name).read_text("utf-8"))["runs"]
    error = {}
    for method in ("CE", "CSM all-class, soft CE", "label smoothing, matched"):
        values = [run["before"]["ece_mass"] for run in runs[method].values()]
        error[method] = f"{100 * sum(values) / len(values):.1f}"
    ce, ours, smoothing = error.values()
    text = " ".join(README.split())
    assert (
        f"adaptive ECE before temperature from {ce} to {ours}; matched smoothing reaches {smoothing} too"
        in text
    )
