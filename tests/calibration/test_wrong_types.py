"""Arguments of a wrong type get a clear error where no type checks run, as in a user's program."""

import json
import subprocess
import sys

SCRIPT = """
import json
import numpy as np
import torch
from diffcal.calibration import build_loss, measure
from diffcal.errors import DiffcalError

logits, labels = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
loss = build_loss("focal")
calls = {
    "array of logits": lambda: loss(logits.numpy(), labels),
    "array of targets": lambda: loss(logits, labels.numpy()),
    "fraction of bins": lambda: measure("ece", logits=logits, labels=labels, n_bins=7.5),
    "bins of NumPy": lambda: measure("ece", logits=logits, labels=labels, n_bins=np.int64(7)),
    "bins": lambda: measure("ece", logits=logits, labels=labels, n_bins=7),
}
found = {}
for name, call in calls.items():
    try:
        found[name] = float(call())
    except DiffcalError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def test_wrong_types_are_named():
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    found = json.loads(made.stdout)
    assert found["array of logits"] == "logits must be a torch tensor, got ndarray"
    assert found["array of targets"] == "targets must be a torch tensor, got ndarray"
    assert found["fraction of bins"] == "n_bins must be a whole number of at least 1, got 7.5"
    assert found["bins of NumPy"] == found["bins"] > 0
