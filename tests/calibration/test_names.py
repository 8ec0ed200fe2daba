"""The names at the top of the package."""

import json
import subprocess
import sys

import pytest
import torch

import diffcal.calibration as calibration
from diffcal.cli import _rows_on_one_line


def test_every_name_is_there_and_works():
    assert all(callable(getattr(calibration, name)) for name in calibration.__all__)
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1, 1])
    assert calibration.measure("accuracy", logits=logits, labels=labels) == pytest.approx(2 / 3)
    assert float(calibration.build_loss("cross_entropy")(logits, labels)) > 0
    scaled = calibration.build_calibrator("temperature").fit(logits, labels)
    assert scaled.predict_proba(logits).shape == (3, 2)


def test_the_package_loads_nothing_of_itself():
    code = "import sys, diffcal.calibration; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'reliability'"):
        calibration.reliability  # noqa: B018


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None], "b": ["x [ y ]", "z\n[\n 1\n]"], "c": []},
        {"rows": [[1, 2], [3, 4]], "d": [{"e": [1]}, "f"]},
    ],
)
def test_lists_on_one_line_keep_their_value(value):
    shown = _rows_on_one_line(json.dumps(value, indent=2))
    assert json.loads(shown) == value
    assert len(shown.splitlines()) < len(json.dumps(value, indent=2).splitlines())
