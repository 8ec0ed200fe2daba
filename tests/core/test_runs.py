import errno
import json

import pytest

from diffcal.core.runs import claim_folder, fingerprint, read_json, write_atomic, write_json
from diffcal.errors import ArtifactError


def test_claim_resume_and_refusal(tmp_path):
    folder = tmp_path / "run"
    config = {"plan": {"groups": 4}, "seed": 0}
    assert claim_folder(folder, config) is False
    assert claim_folder(folder, config) is True
    (folder / "shard").write_text("kept")
    with pytest.raises(ArtifactError, match=r"plan\.groups: 4 there, 5 now"):
        claim_folder(folder, {"plan": {"groups": 5}, "seed": 0})
    assert (folder / "shard").read_text() == "kept"
    assert claim_folder(folder, {"plan": {"groups": 5}, "seed": 0}, overwrite=True) is False
    assert not (folder / "shard").exists()


def test_foreign_folder_is_never_emptied(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="was not made by this command"):
        claim_folder(tmp_path, {"seed": 0}, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 768, "seed": 1},
        {},
        ["seed"],
    ],
)
def test_a_config_of_another_program_is_no_leave_to_empty_its_folder(tmp_path, content):
    write_json(tmp_path / "config.json", content)
    (tmp_path / "model.safetensors").write_text("weights")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="was not written by this command"):
            claim_folder(tmp_path, {"plan": {}, "rate": 1, "seed": 0}, overwrite=overwrite)
    assert (tmp_path / "model.safetensors").exists()


def test_settings_that_a_version_added_do_not_stop_an_overwrite(tmp_path):
    claim_folder(tmp_path, {"plan": {}, "seed": 0})
    assert claim_folder(tmp_path, {"plan": {}, "rate": 1, "seed": 0}, overwrite=True) is False


@pytest.mark.parametrize("below", [".", "inner"])
def test_a_file_where_a_folder_should_be_is_named(tmp_path, below):
    path = tmp_path / "out"
    path.write_text("a file")
    with pytest.raises(ArtifactError, match=r"out.*a\.json' cannot be written"):
        write_json(path / below / "a.json", {})
    with pytest.raises(ArtifactError, match="cannot be written"):
        claim_folder(path / below, {"seed": 0}, overwrite=True)
    assert path.read_text() == "a file"


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def full(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArtifactError, match=r"no space left while writing .*a\.json"):
        write_atomic(path, full)
    assert read_json(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_refuses_nan_and_names_broken_files(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "n.json", {"x": float("nan")})
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"broken\.json"):
        read_json(tmp_path / "broken.json")
    with pytest.raises(ArtifactError, match="does not exist"):
        read_json(tmp_path / "absent.json")


def test_fingerprint_ignores_key_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint(json.loads('{"b": [2], "a": 1}'))
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
