"""The benchmark against other tools, with diffcal's own paths only: they are never needed here."""

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import attribution_peers

    reasons = {"trak": "No module named 'trak'", "dattri": "No module named 'dattri'"}
    monkeypatch.setattr(attribution_peers, "installed", lambda names: reasons)
    return attribution_peers


def test_runs_without_peers_and_says_so(benchmark, monkeypatch, tmp_path, capsys):
    out = tmp_path / "result.json"
    sizes = {"--train": 3, "--queries": 2, "--dims": 4096, "--timesteps": 1, "--steps": 1}
    flags = [str(part) for pair in sizes.items() for part in pair]
    flags += [
        "--repeats",
        "1",
        "--only",
        "das",
        "sketched_das_mean",
        "sjlt_das_mean",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["attribution_peers.py", *flags])
    threads = torch.get_num_threads()
    benchmark.main()
    torch.set_num_threads(threads)
    report = json.loads(out.read_text("utf-8"))
    assert set(report["missing_peers"]) == {"trak", "dattri"}
    results = report["results"]["4096"]
    assert results.pop("rounds") == 1
    assert set(results) == {"sketched", "sjlt", "das", "sketched_das_mean", "sjlt_das_mean"}
    for name, found in results.items():
        # Wrong noise, timesteps or damping of the yardstick would show as another order of rows.
        assert found["fidelity"]["pearson_mean"] > 0.95, name
        assert found["cpu_seconds"] > 0
    assert results["sjlt"]["over_sjlt"] == 1.0


def test_exact_scores_are_those_of_the_primal_kernel(benchmark):
    from _attribution_tools import Problem, exact_scores

    generator = torch.Generator().manual_seed(0)
    phi, psi = (torch.randn(n, 9, generator=generator).double() for n in (5, 3))
    problem = Problem(None, phi, psi, 1, "mean", rho=0.2)  # type: ignore[arg-type]
    damping = 0.2 * phi.square().sum(dim=1).mean()
    kernel = phi.mT @ phi + damping * torch.eye(9).double()
    wanted = psi @ torch.linalg.solve(kernel, phi.mT)
    torch.testing.assert_close(
        exact_scores(problem, phi.float(), psi.float()), wanted, rtol=1e-4, atol=1e-5
    )


def test_correlations_look_at_one_query_at_a_time(benchmark):
    from _attribution_tools import correlations

    wanted = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 2.0]])
    found = torch.stack([wanted[0] * 5 - 100, wanted[1] * -2])
    result = correlations(found, wanted)
    assert result == pytest.approx(
        {"pearson_mean": 0, "pearson_lowest": -1, "spearman_mean": 0, "spearman_lowest": -1},
        abs=1e-9,
    )
