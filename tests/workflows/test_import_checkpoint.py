"""``diffcal checkpoints import`` and ``show`` as a user types them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffcal.cli import main
from diffcal.core.rng import item_normal
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.samplers import SamplerConfig, sample
from diffcal.errors import ArtifactError
from diffcal.workflows import import_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@torch.no_grad()
def test_import_show_and_sample(tmp_path, capsys):
    out = tmp_path / "net"
    status, text, _ = run(
        capsys,
        *("checkpoints", "import", GOLDEN / "edm_sample.pkl"),
        *("--out", out, "--class-names", "cat,dog,eel"),
    )
    assert status == 0
    summary = json.loads(text)
    assert summary["preconditioner"] == "EDMPrecond"
    assert summary["classes"] == 3
    status, text, _ = run(capsys, "checkpoints", "show", out)
    # Strict JSON: NaN and infinity, which Python would write, are refused here.
    shown = json.loads(text, parse_constant=pytest.fail)
    assert status == 0
    assert shown["classes"] == ["cat", "dog", "eel"]
    assert shown["fingerprint"] == summary["fingerprint"]
    assert shown["parameters"] == summary["parameters"]

    denoiser = load_denoiser(out)
    golden = load_file(GOLDEN / "edm_sample.safetensors")
    result = denoiser(golden["in/x"], golden["in/sigma"], golden["in/class_labels"])
    torch.testing.assert_close(result, golden["out32"], rtol=0, atol=1e-5)
    noise = torch.stack([item_normal(0, "test", i, denoiser.sample_shape) for i in range(3)])
    x = sample(denoiser, noise, denoiser.condition(torch.eye(3)), SamplerConfig(steps=4))
    pixels = denoiser.decode(x.float())
    assert pixels.shape == (3, 8, 8, 3)
    assert pixels.float().std() > 1


@pytest.mark.parametrize("kind", ["reduce", "global", "storage"])
def test_evil_files_end_in_one_line(kind, tmp_path, capsys):
    status, out, err = run(
        capsys, "checkpoints", "import", GOLDEN / f"edm_evil_{kind}.pkl", "--out", tmp_path / "x"
    )
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "not on the list of accepted names; nothing was run" in err
    assert not (tmp_path / "x").exists()


def test_nothing_of_a_refused_file_runs_in_a_fresh_process(tmp_path):
    """As a user would do it, with a file that leaves a trace when it is unpickled."""
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"ema": Evil()}))
    command = [sys.executable, "-m", "diffcal", "checkpoints", "import", str(path)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "net")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "not on the list of accepted names" in done.stderr
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())  # the control: the trap works
    assert (tmp_path / "ran").exists()


def test_errors_end_in_one_line(tmp_path, capsys):
    sample_path = tmp_path / "edm.pkl"
    shutil.copy(GOLDEN / "edm_sample.pkl", sample_path)
    for arguments, message in [
        (("import", tmp_path / "absent.pkl", "--out", tmp_path / "x"), "is not a file"),
        (("import", sample_path, "--out", tmp_path / "x", "--sha256", "ab"), "has SHA-256"),
        (("import", sample_path, "--out", tmp_path / "x", "--class-names", "a,b"), "2 class names"),
        (("show", sample_path), "checkpoints import"),
        (("show", tmp_path / "absent"), "is missing"),
    ]:
        status, _, err = run(capsys, "checkpoints", *arguments)
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_folder_of_something_else_is_kept(tmp_path):
    (tmp_path / "config.json").write_text('{"mine": true}', "utf-8")
    with pytest.raises(ArtifactError, match="something else"):
        import_checkpoint.run(GOLDEN / "edm_sample.pkl", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
