"""Every training example learns from a published set; a library that is not installed skips its own."""

import runpy
from pathlib import Path

import pytest
from published_set import publish_rows

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty-five groups of five digits; do not write into it."""
    return publish_rows(tmp_path_factory.mktemp("set") / "dataset", groups=45)


# timm cannot be imported without torchvision, which ImportError tells
@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("train_plain_pytorch", "torch"),
        ("train_lightning", "lightning"),
        ("train_transformers", "transformers"),
        ("train_timm", "timm"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_example_trains(name, needs, folder, monkeypatch):
    pytest.importorskip(needs, exc_type=ImportError)
    monkeypatch.setattr("sys.argv", [name, str(folder), "--steps", "40"])
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    found = example["main"]()
    assert found["steps"] == 40
    # chance level is log 10 = 2.30 nats (and, for pairs, another 0.5 of squared error)
    assert found["last_loss"] < 0.8 * found["first_loss"]
