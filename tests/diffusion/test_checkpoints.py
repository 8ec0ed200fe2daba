"""Checkpoint folders: exact round trips, and one clear line for every way of being wrong."""

import hashlib
import json
import os
import pickle
import struct

import pytest
import torch
from edm_golden import NETS, network
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffcal.diffusion import checkpoints
from diffcal.diffusion.checkpoints import load_denoiser, save_denoiser
from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.edm_networks import build_network
from diffcal.errors import ArtifactError, CheckpointError, ConfigError, DiffcalError

NAMES = ["cat", "dog", "eel"]


def tiny():
    torch.manual_seed(5)
    kwargs = {
        "img_resolution": 8,
        "img_channels": 3,
        "label_dim": 3,
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
        "model_type": "SongUNet",
    }
    return build_network({"preconditioner": "EDMPrecond", "kwargs": kwargs}).eval()


@pytest.fixture
def folder(tmp_path):
    save_denoiser(tmp_path / "net", tiny(), NAMES, {"steps": 3})
    return tmp_path / "net"


def edit(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config.update(values)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}), "utf-8")


def resave(folder, change):
    """Weights after ``change``, with a hash that agrees."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit(folder, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("name", NETS["nets"])
def test_round_trip_is_exact(name, tmp_path):
    original = network(name)
    names = NAMES if original.label_dim else []
    save_denoiser(tmp_path / "net", original, names, {})
    loaded = load_denoiser(tmp_path / "net")
    assert isinstance(loaded, Denoiser)
    assert loaded.module.config == original.config
    state = original.state_dict()
    found = loaded.module.state_dict()
    assert list(found) == list(state)
    for key in state:
        torch.testing.assert_close(found[key], state[key], rtol=0, atol=0)
    assert loaded.class_names == tuple(names)
    # Saving what was loaded gives the same bytes.
    save_denoiser(tmp_path / "again", loaded.module, names, {})
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "net" / file).read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_formats_round_parameters_and_keep_buffers(dtype, tmp_path):
    original = network("ncsnpp_edm")
    save_denoiser(tmp_path / "net", original, NAMES, {}, dtype=dtype)
    state, found = original.state_dict(), load_denoiser(tmp_path / "net").module.state_dict()
    parameters = {key for key, _ in original.named_parameters()}
    for key, value in state.items():
        expected = value.to(getattr(torch, dtype)).float() if key in parameters else value
        torch.testing.assert_close(found[key], expected, rtol=0, atol=0)
        assert found[key].dtype == torch.float32
    sizes = [os.path.getsize(tmp_path / "net/model.safetensors")]
    save_denoiser(tmp_path / "full", original, NAMES, {})
    assert sizes[0] < 0.6 * os.path.getsize(tmp_path / "full/model.safetensors")


def test_file_is_one_that_safetensors_accepts(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(list(file.keys())) == len(tiny().state_dict())
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["format"] == checkpoints.FORMAT
    assert config["training"] == {"steps": 3}
    assert config["channels"] == 3
    data = (folder / "model.safetensors").read_bytes()
    assert config["sha256"] == hashlib.sha256(data).hexdigest()


def test_loaded_weights_do_not_depend_on_the_file(folder):
    loaded = load_denoiser(folder).module
    before = {k: v.clone() for k, v in loaded.state_dict().items()}
    path = folder / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_loading_leaves_the_random_stream_alone(folder):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_denoiser(folder)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_saving_again_replaces_and_foreign_folders_are_kept(folder, tmp_path):
    save_denoiser(folder, tiny(), [], {})
    assert load_denoiser(folder).class_names == ("0", "1", "2")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"_class_name": "UNet"}', "utf-8")
    with pytest.raises(ArtifactError, match="something else"):
        save_denoiser(tmp_path / "other", tiny(), [], {})
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == ["config.json"]


def test_what_cannot_be_saved_is_refused(tmp_path):
    from diffcal.diffusion.preconditioning import EDMPrecond

    raw = EDMPrecond(8, 3, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1)
    with pytest.raises(ConfigError, match="build_network"):
        save_denoiser(tmp_path / "x", raw, [], {})
    with pytest.raises(ConfigError, match="2 class names for a network with 3"):
        save_denoiser(tmp_path / "x", tiny(), ["a", "b"], {})
    with pytest.raises(ConfigError):
        save_denoiser(tmp_path / "x", tiny(), [], {}, dtype="int8")
    bad = tiny()
    with torch.no_grad():
        bad.model.map_layer0.bias[0] = 1e6
    with pytest.raises(CheckpointError, match=r"map_layer0\.bias.*float16.*bfloat16"):
        save_denoiser(tmp_path / "x", bad, [], {}, dtype="float16")
    with torch.no_grad():
        bad.model.map_layer0.bias[0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite as float32"):
        save_denoiser(tmp_path / "x", bad, [], {})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "diffcal-denoiser/9"}, "has format 'diffcal-denoiser/9'; this version reads"),
        ({"kwargs": ...}, "lacks 'kwargs'"),
        ({"preconditioner": ...}, "lacks 'preconditioner'"),
        (
            {"sigma_data": 0.5},
            "unknown key 'sigma_data': correct or remove it (known keys: format,",
        ),
        ({"class_names": "cat"}, "list of names"),
        ({"class_names": ["cat"]}, "1 class names for a network with 3"),
        ({"kwargs": [1]}, "table of arguments"),
        ({"preconditioner": "Evil"}, "unknown preconditioner 'Evil'"),
        ({"kwargs": {"img_resolution": 8, "img_channels": 3, "x": 1}}, "no argument 'x'"),
        ({"sha256": "00"}, "does not have the hash"),
    ],
)
def test_wrong_configuration_is_told(values, message, folder):
    edit(folder, **values)
    with pytest.raises(CheckpointError) as caught:
        load_denoiser(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.map_layer0.bias"), "lacks 1 of the network's"),
        (lambda t: t.update(extra=torch.zeros(1)), "surplus tensors (1), first 'extra'"),
        (
            lambda t: t.update({"model.map_layer0.bias": torch.zeros(5)}),
            "'model.map_layer0.bias' has shape [5], the network needs [32]",
        ),
        (
            lambda t: t["model.map_layer0.bias"].fill_(torch.inf),
            "'model.map_layer0.bias' holds NaN or infinite values",
        ),
    ],
)
def test_wrong_weights_are_told(change, message, folder):
    resave(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_denoiser(folder)
    assert message in str(caught.value)


def test_damaged_files_are_told(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for bad in (data[:100], data[:-1], b"", struct.pack("<Q", 2**60) + data[8:]):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load_denoiser(folder)
    flipped = bytearray(data)
    flipped[-5] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(CheckpointError, match="does not have the hash"):
        load_denoiser(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        load_denoiser(folder)
    (folder / "config.json").write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_denoiser(folder)


def test_process_killed_between_weights_and_configuration_is_noticed(folder, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    other = tiny()
    with torch.no_grad():
        other.model.map_layer0.bias.add_(1)
    monkeypatch.setattr(checkpoints, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save_denoiser(folder, other, NAMES, {})
    with pytest.raises(CheckpointError, match="writing was interrupted"):
        load_denoiser(folder)


def test_a_pickle_in_the_place_of_weights_is_never_opened(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    for path in (folder / "model.safetensors", tmp_path / "evil.pkl"):
        path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_denoiser(folder)
    with pytest.raises(CheckpointError, match="checkpoints import"):
        load_denoiser(tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()


def test_folder_or_hub_name_that_is_not_there_ends_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for source, message in [
        (tmp_path / "absent", "is missing; expected a folder"),
        (tmp_path / "empty", "holds neither a diffcal nor a diffusers model"),
        ("nobody/nothing-of-this-name", "nobody/nothing-of-this-name"),
        ("not a name", "is missing"),
    ]:
        with pytest.raises(DiffcalError) as caught:
            load_denoiser(source)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_options_devices_and_formats_are_checked(folder):
    with pytest.raises(ConfigError, match="takes no option 'prompts'"):
        load_denoiser(folder, prompts=["a"])
    with pytest.raises(ConfigError):
        load_denoiser(folder, device="abacus")
    with pytest.raises(ConfigError):
        load_denoiser(folder, dtype="int8")


@torch.no_grad()
def test_half_precision_runs_close_to_float32(folder):
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 3.0])
    full, half = load_denoiser(folder), load_denoiser(folder, dtype="bfloat16")
    weights = torch.eye(3)[:2]
    expected = full(x, sigma, full.condition(weights))
    result = half(x, sigma, half.condition(weights))
    assert result.dtype == torch.float32
    difference = float((result - expected).abs().max())
    assert 0 < difference < 0.05
