"""The recipes of CONTRIBUTING.md: their code runs, their tests pass."""

import re
import sys
import types
from pathlib import Path

import pytest

from diffcal.calibration.losses import registry as losses
from diffcal.calibration.metrics import registry as metrics
from diffcal.calibration.metrics.registry import Measure
from diffcal.mixing import annotators

sys.path.append(str(Path(__file__).parent / "mixing"))  # where its helper of Gaussian classes lies

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")
FILES = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", TEXT, re.DOTALL))


def module(path, monkeypatch):
    """The file of a recipe as an imported module."""
    name = path.removesuffix(".py").replace("/", ".")
    made = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(FILES[path], path, "exec"), made.__dict__)
    return made


def run(path, monkeypatch, tmp_path):
    """Every test of a recipe's test file."""
    tests = module(path, monkeypatch)
    functions = [value for name, value in vars(tests).items() if name.startswith("test_")]
    assert functions
    for function in functions:
        function(*[tmp_path][: function.__code__.co_argcount])


def test_each_recipe_has_code_and_test_and_fits_a_page():
    assert len(FILES) == 8
    assert sum(path.startswith("tests/") for path in FILES) == 4
    for part in TEXT.split("\n## "):
        if part.startswith("Adding a"):
            assert len(part.splitlines()) < 130, part.splitlines()[0]


def test_the_loss(monkeypatch, tmp_path):
    poly = module("diffcal/calibration/losses/poly.py", monkeypatch)
    monkeypatch.setitem(losses.LOSSES, "poly1", poly.Poly1)
    assert '`"poly1": Poly1,`' in TEXT
    run("tests/calibration/losses/test_poly.py", monkeypatch, tmp_path)


def test_the_measure(monkeypatch, tmp_path):
    made = module("diffcal/calibration/metrics/spherical.py", monkeypatch)
    line = re.search(r'"spherical": (Measure\(.*?\)),\n\n', TEXT, re.DOTALL)
    assert line is not None
    entry = eval(line[1], {"Measure": Measure, **vars(made)})
    monkeypatch.setitem(metrics.MEASURES, "spherical", entry)
    run("tests/calibration/metrics/test_spherical.py", monkeypatch, tmp_path)


def test_the_annotator(monkeypatch, tmp_path):
    made = module("diffcal/mixing/nearest_mean.py", monkeypatch)
    table = {**annotators.ANNOTATORS, "nearest_mean": made.NearestMean}
    monkeypatch.setattr(annotators, "ANNOTATORS", table)
    assert '`"nearest_mean": NearestMean,`' in TEXT
    run("tests/mixing/test_nearest_mean.py", monkeypatch, tmp_path)


def test_the_denoiser(monkeypatch, tmp_path):
    module("diffcal/diffusion/flow_denoiser.py", monkeypatch)
    run("tests/diffusion/test_flow_denoiser.py", monkeypatch, tmp_path)


@pytest.mark.parametrize("path", re.findall(r"`((?:tests|benchmarks|diffcal)/[\w/.]+\.py)`", TEXT))
def test_files_that_it_names_exist(path):
    assert (Path(__file__).parents[1] / path).exists()
