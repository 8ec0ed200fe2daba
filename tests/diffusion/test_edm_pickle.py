"""Snapshots of EDM: read exactly, imported exactly, and refused by name when anything is off."""

import dataclasses
import json

import pytest
import torch
from edm_golden import GOLDEN, NETS, SAMPLE, network, sample_tensors
from edm_writer import (
    SOURCE,
    Call,
    Global,
    New,
    Raw,
    emit,
    number,
    persistent,
    snapshot,
    storage,
    stored,
    stream,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from watching import nothing_runs

from diffcal.diffusion import edm_pickle, edm_snapshot
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.edm_networks import build_network
from diffcal.diffusion.edm_pickle import import_edm_pickle
from diffcal.diffusion.edm_snapshot import read_snapshot
from diffcal.errors import CheckpointError, ConfigError, UnsafeCheckpointError

GOOD = ["edm_sample.pkl", "edm_sample_torch2.pkl"]
EVIL = {
    "edm_evil_reduce.pkl": "'posix.system'",
    "edm_evil_global.pkl": "'subprocess.check_output'",
    "edm_evil_storage.pkl": "'posix.system'",
}
TINY = {"img_resolution": 8, "img_channels": 3, "model_channels": 8, "num_blocks": 1}


def tiny(preconditioner="EDMPrecond", **kwargs):
    torch.manual_seed(3)
    values = TINY | {"model_type": "SongUNet", "channel_mult": [1]} | kwargs
    return build_network({"preconditioner": preconditioner, "kwargs": values}).eval()


def state_of(content):
    return content["ema"].arguments[0]["state"]


def written(tmp_path, content, version=4):
    path = tmp_path / "network-snapshot-000001.pkl"
    path.write_bytes(content if isinstance(content, bytes) else stream(content, version))
    return path


def refusal(tmp_path, content, error=CheckpointError):
    """Message with which the import is refused; nothing runs and nothing is written."""
    path, out = written(tmp_path, content), tmp_path / "out"
    with nothing_runs():
        told = _told(error, read_snapshot, path)
    # Reading alone may be fine: the import compares with the network.
    told = told or _told(error, import_edm_pickle, path, out)
    assert told is not None, "the file was accepted"
    assert not out.exists()
    assert "\n" not in told
    return told


def _told(error, function, *arguments):
    """Message of the expected ``error``, or None if there is none."""
    try:
        function(*arguments)
    except error as caught:
        return str(caught)
    return None


@pytest.mark.parametrize("name", GOOD)
def test_sample_is_read_exactly(name):
    with nothing_runs():
        found = read_snapshot(GOLDEN / name)
    assert found.preconditioner == SAMPLE["precond"]
    assert found.kwargs == SAMPLE["kwargs"]
    assert found.arguments == ()
    assert found.dataset == SAMPLE["dataset_kwargs"]
    assert list(found.tensors) == SAMPLE["keys"]
    for key, stored_tensor in found.tensors.items():
        expected = sample_tensors()[f"state/{key}"]
        torch.testing.assert_close(stored_tensor.tensor(), expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", GOOD)
def test_imported_sample_gives_the_original_output(name, tmp_path):
    summary = import_edm_pickle(GOLDEN / name, tmp_path / "net", class_names=["a", "b", "c"])
    denoiser = load_denoiser(tmp_path / "net")
    given_, expected = sample_tensors(), sample_tensors()["out32"]
    result = denoiser(given_["in/x"], given_["in/sigma"], given_["in/class_labels"])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert denoiser.class_names == ("a", "b", "c")
    for key, tensor in denoiser.module.state_dict().items():
        torch.testing.assert_close(tensor, sample_tensors()[f"state/{key}"], rtol=0, atol=0)
    assert summary["tensors"] == len(SAMPLE["keys"])
    assert (summary["classes"], summary["resolution"], summary["network"]) == (3, 8, "SongUNet")


@pytest.mark.parametrize("name", EVIL)
def test_evil_sample_is_refused_by_name(name):
    assert set(EVIL) == set(SAMPLE["must_refuse"])
    with nothing_runs(), pytest.raises(UnsafeCheckpointError) as caught:
        read_snapshot(GOLDEN / name)
    assert EVIL[name] in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize(
    "name", ["ddpmpp_vp", "ncsnpp_ve", "adm_edm", "adm_iddpm", "song_skip_edm"]
)
def test_other_networks_import_with_equal_output(name, version, tmp_path):
    original = network(name)
    path = written(tmp_path, snapshot(original), version)
    import_edm_pickle(path, tmp_path / "out")
    loaded = load_denoiser(tmp_path / "out").module
    assert loaded.config == original.config
    x = torch.randn(2, 3, original.img_resolution, original.img_resolution)
    labels = torch.eye(3)[:2] if original.label_dim else None
    sigma = torch.tensor([0.3, 2.0])
    torch.testing.assert_close(
        loaded(x, sigma, labels), original(x, sigma, labels), rtol=0, atol=1e-6
    )


def test_golden_networks_cover_every_kind():
    kinds = {(e["precond"], e["kwargs"]["model_type"]) for e in NETS["nets"].values()}
    assert len({kind for kind, _ in kinds}) == 4
    assert len({model for _, model in kinds}) == 2


def test_embedded_source_is_never_looked_at(tmp_path):
    content = snapshot(tiny())
    assert "raise RuntimeError" in SOURCE
    path = written(tmp_path, content)
    with nothing_runs():
        assert read_snapshot(path).preconditioner == "EDMPrecond"
    # Not even its type matters.
    content["ema"].arguments[0]["module_src"] = {"not": "text"}
    read_snapshot(written(tmp_path, content))


def test_snapshot_with_fewer_entries_and_defaults_is_read(tmp_path):
    content = snapshot(tiny())
    for key in ("loss_fn", "augment_pipe", "dataset_kwargs"):
        del content[key]
    import_edm_pickle(written(tmp_path, content), tmp_path / "out")
    assert load_denoiser(tmp_path / "out").num_classes == 0


def test_positional_arguments_and_numpy_numbers_are_understood(tmp_path):
    net = tiny(dropout=0.25)
    content = snapshot(net)
    state = state_of(content)
    kwargs = state["_init_kwargs"]
    state["_init_args"] = (kwargs.pop("img_resolution"), kwargs.pop("img_channels"), 0)
    kwargs["dropout"] = number(0.25)
    import_edm_pickle(written(tmp_path, content), tmp_path / "out")
    found = load_denoiser(tmp_path / "out").module
    assert found.config["kwargs"] == net.config["kwargs"] | {"label_dim": 0}


def test_one_tensor_shared_by_reference_is_legal(tmp_path):
    net = tiny()
    with torch.no_grad():
        net.model.map_layer0.bias.copy_(net.model.map_layer1.bias)
    content = snapshot(net)
    modules = state_of(content)["_modules"]["model"].arguments[0]["state"]["_modules"]
    first = modules["map_layer0"].arguments[0]["state"]["_parameters"]
    second = modules["map_layer1"].arguments[0]["state"]["_parameters"]
    shared = first["bias"]
    first["bias"] = Raw(emit(shared) + b"r\x00\x01\x00\x00")  # memo entry 256
    second["bias"] = Raw(b"j\x00\x01\x00\x00")
    import_edm_pickle(written(tmp_path, content), tmp_path / "out")
    loaded = load_denoiser(tmp_path / "out").module.model
    torch.testing.assert_close(loaded.map_layer1.bias, net.model.map_layer1.bias, rtol=0, atol=0)


ATTACKS = [
    Call("posix.system", ("true",)),
    Call("builtins.eval", ("1",)),
    Call("torch.load", ("x",)),
    Call("torch._C._import_ir_module", ()),
    Global("subprocess.Popen"),
    Global("os.path.join"),
    New("argparse.Namespace", {"a": 1}),
    New("torch.nn.modules.linear.Linear", {"weight": 1}),
]
PLACES = ["top", "kwargs", "module", "buffers", "loss", "storage", "hook"]


@pytest.mark.parametrize(
    ("place", "attack"),
    [("kwargs", attack) for attack in ATTACKS] + [(place, ATTACKS[0]) for place in PLACES],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_foreign_names_are_refused_wherever_they_hide(place, attack, tmp_path):
    content = snapshot(tiny())
    state = state_of(content)
    model = state["_modules"]["model"].arguments[0]["state"]
    layer = model["_modules"]["map_layer0"].arguments[0]["state"]
    if place == "top":
        content["extra"] = attack
    elif place == "kwargs":
        state["_init_kwargs"]["dropout"] = attack
    elif place == "module":
        model["_modules"]["map_layer0"] = attack
    elif place == "buffers":
        layer["_buffers"]["evil"] = attack
    elif place == "loss":
        content["loss_fn"] = persistent("EDMLoss", {"x": attack})
    elif place == "hook":
        layer["_forward_hooks"] = {"0": attack}
    else:
        layer["_parameters"]["bias"] = stored(torch.zeros(1), storage=stream(attack))
    message = refusal(tmp_path, content, UnsafeCheckpointError)
    assert f"'{attack.name}'" in message


def bent_state(change):
    """Content of a snapshot whose root state went through ``change``."""
    content = snapshot(tiny(label_dim=2))
    change(state_of(content))
    return content


def layer_of(state, name="map_layer0"):
    model = state["_modules"]["model"].arguments[0]["state"]
    return model["_modules"][name].arguments[0]["state"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["_init_kwargs"].update(hidden=1), "no argument 'hidden'"),
        (lambda s: s["_init_kwargs"].update(model_type="GPT"), "model_type must be one of"),
        (lambda s: s["_init_kwargs"].pop("img_resolution"), "needs the argument 'img_resolution'"),
        (lambda s: s["_init_kwargs"].update(dropout=float("nan")), "finite number"),
        (lambda s: s["_init_kwargs"].update(label_dim=3), "shape"),
        (lambda s: s["_init_kwargs"].update(label_dim=0), "is a Linear in the snapshot"),
        (lambda s: s["_init_kwargs"].update(augment_dim=9), "'model.map_augment' is missing"),
        (lambda s: s["_init_kwargs"].update(model_channels=16), "shape"),
        (lambda s: s["_init_kwargs"].update(img_resolution=16), "module"),
        (lambda s: s["_init_kwargs"].update({"a.b": 1}), "argument called 'a.b'"),
        (lambda s: s["_init_kwargs"].update(dropout={"x": 1}), "argument 'dropout' is a dict"),
        (lambda s: s["_init_kwargs"].update(model_type="x" * 1001), "argument 'model_type'"),
        (lambda s: s["_init_kwargs"].update(channel_mult=[[1]]), "argument 'channel_mult'"),
        (lambda s: s.update(_init_kwargs=[1]), "not a tuple and a dict"),
        (lambda s: s.update(_init_args=(8, 3)), "'img_channels' twice"),
        (lambda s: s.update(_init_args=(1,) * 20), "20 positional arguments"),
        (lambda s: s.update(_modules=[1]), "_modules is not a dict"),
        (lambda s: s["_modules"].update({"a.b": None}), "name 'a.b'"),
        (lambda s: s["_modules"].update({"model": {"weights": 1}}), "'model' is not a module"),
        (lambda s: layer_of(s)["_parameters"].pop("bias"), "lacks 1 of the network's"),
        (lambda s: layer_of(s)["_parameters"].update(bias=None), "lacks 1 of the network's"),
        (lambda s: layer_of(s)["_parameters"].update(bias=[0.0]), "'model.map_layer0.bias' is not"),
        (lambda s: layer_of(s)["_parameters"].update({"..": None}), "name '..'"),
        (
            lambda s: layer_of(s)["_buffers"].update(extra=stored(torch.zeros(1))),
            "surplus tensors .1., first 'model.map_layer0.extra'",
        ),
        (
            lambda s: layer_of(s)["_buffers"].update(bias=stored(torch.zeros(32))),
            "'model.map_layer0.bias' is there twice",
        ),
        (
            lambda s: layer_of(s)["_parameters"].update(bias=stored(torch.zeros(31))),
            r"shape \[31\], the network needs \[32\]",
        ),
        (
            lambda s: layer_of(s)["_parameters"].update(bias=stored(torch.full((32,), torch.nan))),
            "NaN or infinite",
        ),
        (
            lambda s: layer_of(s)["_parameters"].update(bias=stored(torch.zeros(32).long())),
            "int64",
        ),
        (
            lambda s: layer_of(s)["_parameters"].update(bias=stored(torch.zeros(32), stride=(-1,))),
            "stride",
        ),
        (
            lambda s: layer_of(s)["_parameters"].update(bias=stored(torch.zeros(32), offset=1)),
            "beyond its storage",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    import re

    found = refusal(tmp_path, bent_state(change))
    assert re.search(message, found), found


@pytest.mark.parametrize(
    ("bent", "message"),
    [
        ({"type": "function"}, "not described as a class"),
        ({"version": 5}, "version 5; version 6"),
        ({"version": "6"}, "version"),
        ({"class_name": "os.system"}, "no proper class name"),
        ({"class_name": 3}, "no proper class name"),
        ({"class_name": "MyPrecond"}, "holds a 'MyPrecond'"),
        ({"class_name": "VPPrecond"}, "module '' is a VPPrecond|no argument|sigma"),
        ({"state": [1]}, "has no state"),
    ],
)
def test_description_of_a_persistent_object_is_checked(bent, message, tmp_path):
    import re

    content = snapshot(tiny())
    content["ema"].arguments[0].update(bent)
    if bent.get("class_name") == "VPPrecond":
        # Another preconditioner with the same weights is a legal file; children decide.
        state_of(content)["_modules"]["model"].arguments[0]["class_name"] = "DhariwalUNet"
        message = "'model' is a DhariwalUNet"
    found = refusal(tmp_path, content)
    assert re.search(message, found), found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"net": 1}, "no entry 'ema'"),
        ([1], "no entry 'ema'"),
        ({"ema": None}, "'ema' is not a network"),
        ({"ema": {"a": 1}}, "'ema' is not a network"),
        (b"", "is empty"),
        (b"\x80\x04N.x", "goes on for 1 bytes"),
        (b"hello", "protocol number"),
    ],
)
def test_files_that_are_no_snapshots_are_told(content, message, tmp_path):
    assert message in refusal(tmp_path, content)


def test_torch_archives_are_told_apart(tmp_path):
    for zipped in (True, False):
        path = tmp_path / "training-state-000001.pt"
        torch.save({"net": 1}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"torch\.save archive.*network-snapshot"):
            read_snapshot(path)


def test_changed_filters_are_refused(tmp_path):
    net = tiny(channel_mult=[1, 1])
    with torch.no_grad():
        net.get_buffer("model.enc.4x4_down.conv0.resample_filter").mul_(1.01)
    assert "not the filter of resample_filter [1, 1]" in refusal(tmp_path, snapshot(net))


def test_noise_table_that_does_not_fall_is_refused(tmp_path):
    net = tiny("iDDPMPrecond", M=10)
    net.u[3] = net.u[4]
    assert "does not fall to 0" in refusal(tmp_path, snapshot(net))


def test_hash_is_checked_before_anything_is_read(tmp_path):
    path = written(tmp_path, snapshot(tiny()))
    with pytest.raises(CheckpointError, match=r"has SHA-256 .* but 00ff was asked for"):
        import_edm_pickle(path, tmp_path / "out", sha256="00FF ")
    with pytest.raises(CheckpointError, match="SHA-256"):
        import_edm_pickle(GOLDEN / "edm_evil_reduce.pkl", tmp_path / "out", sha256="0" * 64)
    import hashlib

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert import_edm_pickle(path, tmp_path / "out", sha256=digest)["pickle_sha256"] == digest


def test_class_names_must_fit(tmp_path):
    path = written(tmp_path, snapshot(tiny(label_dim=2)))
    with pytest.raises(ConfigError, match="3 class names for a network with 2"):
        import_edm_pickle(path, tmp_path / "out", class_names=["a", "b", "c"])
    assert not (tmp_path / "out").exists()


def test_sizes_are_bounded(tmp_path, monkeypatch):
    path = written(tmp_path, snapshot(tiny()))
    monkeypatch.setattr(edm_snapshot, "_MAX_BYTES", 1000)
    with pytest.raises(CheckpointError, match="stay below"):
        read_snapshot(path)
    monkeypatch.undo()
    monkeypatch.setattr(edm_snapshot, "_MAX_ENTRIES", 20)
    with pytest.raises(CheckpointError, match="over 20 parts"):
        read_snapshot(path)
    monkeypatch.undo()
    monkeypatch.setattr(edm_snapshot, "_MAX_MODULES", 5)
    with pytest.raises(CheckpointError, match="over 5 modules"):
        read_snapshot(path)
    monkeypatch.undo()
    monkeypatch.setattr(edm_pickle, "_MAX_ELEMENTS", 1000)
    with pytest.raises(CheckpointError, match="numbers, more than 1000"):
        import_edm_pickle(path, tmp_path / "out")


def test_module_that_contains_itself_ends(tmp_path):
    loop = Raw(b"ctorch.nn.modules.container\nModuleDict\n)\x81q\x09")
    inner = emit({"_modules": {"a": Raw(b"h\x09"), "b": Raw(b"h\x09")}})
    root = persistent("EDMPrecond", {"_modules": {"model": Raw(loop.opcodes + inner + b"b")}})
    assert "too deep" in refusal(tmp_path, {"ema": root})


def test_storage_in_many_references_is_refused(tmp_path):
    """One storage parsed a thousand times over costs a thousand times its size."""
    data = storage(torch.zeros(500))
    head = emit(Global("torch.storage._load_from_bytes")) + b"q\x00" + emit(data) + b"q\x01"
    content = b"\x80\x04(" + head + b"h\x00h\x01\x85R" * 1000 + b"t."
    assert "repeats its values" in refusal(tmp_path, content)


@pytest.mark.parametrize("name", GOOD)
def test_truncated_files_are_told(name, tmp_path):
    data = (GOLDEN / name).read_bytes()
    cuts = [1, 2, 3, 11, 50, 1000, len(data) // 4, len(data) - 1]
    for cut in cuts:
        assert refusal(tmp_path, data[:cut])


SMALL = None


def small_snapshot():
    global SMALL
    if SMALL is None:
        SMALL = stream(snapshot(tiny(label_dim=2)), 4)
    return SMALL


def opcode_positions(data):
    import pickletools

    return [position for _, _, position in pickletools.genops(data)]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_mutated_files_are_read_or_refused_and_run_nothing(tmp_path_factory, data):
    original = small_snapshot()
    places = opcode_positions(original)
    bent = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        # Structure is hit more often than weights, which are most of the bytes.
        at = data.draw(st.sampled_from(places)) + data.draw(st.integers(0, 3))
        at = min(at, len(bent) - 1)
        kind = data.draw(st.sampled_from(["byte", "opcode", "cut", "insert", "end"]))
        if kind == "byte":
            bent[at] = data.draw(st.integers(0, 255))
        elif kind == "opcode":
            bent[at] = data.draw(st.sampled_from(list(b"Rb\x81c\x93\x82\x83QPiox\x92()}]t0h.")))
        elif kind == "cut":
            del bent[at : at + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            evil = [b"cposix\nsystem\n", b"\x8c\x04true\x85R", b"cos\nabort\n)R", b"h\x00"]
            bent[at:at] = data.draw(st.sampled_from(evil))
        else:
            del bent[at:]
        if not bent:
            break
    path = tmp_path_factory.getbasetemp() / "mutated.pkl"
    path.write_bytes(bytes(bent))
    with nothing_runs():
        told = _told(CheckpointError, read_snapshot, path)
    assert told is None or "\n" not in told


def test_the_official_way_would_have_run_the_evil_samples():
    """The control for all of the above: these files do carry a live call."""
    import pickletools

    for name, shown in EVIL.items():
        data = (GOLDEN / name).read_bytes()
        function = shown.strip("'").rpartition(".")[2].encode()
        assert function in data
        assert list(pickletools.genops(data))[-1][0].name == "STOP"


def test_snapshot_is_frozen():
    found = read_snapshot(GOLDEN / GOOD[0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.kwargs = {}


def test_configuration_on_disk_is_plain_json(tmp_path):
    net = tiny(sigma_max=float("inf"))
    import_edm_pickle(written(tmp_path, snapshot(net)), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text("utf-8"))
    assert config["kwargs"]["sigma_max"] == "inf"
    assert config["training"]["imported_from"] == "network-snapshot-000001.pkl"
    assert load_denoiser(tmp_path / "out").sigma_max == float("inf")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_nonfinite_dataset_notes_are_left_out(tmp_path):
    content = snapshot(tiny())
    content["dataset_kwargs"] = {"a": float("nan"), "b": 3, "c": [1], "d.e": 1, "f": {"x": 1}}
    assert read_snapshot(written(tmp_path, content)).dataset == {"b": 3}
    content["dataset_kwargs"] = 5
    assert read_snapshot(written(tmp_path, content)).dataset == {}
