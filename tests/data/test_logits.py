"""Logits files: every format gives back what was written, and damaged ones are refused by name."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from diffcal.data.logits import load_logits, save_logits
from diffcal.errors import DataError

Z = torch.tensor([[1.0, 2.0, 0.5], [0.1, -3.0, 4.0]])
Y = torch.tensor([1, 2])


@pytest.mark.parametrize("suffix", ["npz", "parquet", "safetensors"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"file.{suffix}"
    save_logits(path, logits=Z, labels=Y, soft_labels=Z.softmax(1))
    content = load_logits(path)
    torch.testing.assert_close(content.logits, Z, rtol=0, atol=0)
    torch.testing.assert_close(content.labels, Y, rtol=0, atol=0)
    torch.testing.assert_close(content.soft_labels, Z.softmax(1), rtol=0, atol=0)
    assert set(content.inputs) == {"logits", "soft_labels"}


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_features_and_head_go_with_the_logits(tmp_path, suffix):
    features, weight, bias = torch.ones(2, 4), torch.arange(12.0).reshape(3, 4), torch.zeros(3)
    path = tmp_path / f"file.{suffix}"
    save_logits(path, logits=Z, labels=Y, features=features, head=(weight.double(), bias))
    content = load_logits(path)
    torch.testing.assert_close(content.features, features, rtol=0, atol=0)
    torch.testing.assert_close(content.head[0], weight, rtol=0, atol=0)
    torch.testing.assert_close(content.head[1], bias, rtol=0, atol=0)
    with pytest.raises(DataError, match="Parquet holds rows only"):
        save_logits(tmp_path / "p.parquet", logits=Z, labels=Y, head=(weight, bias))


def test_soft_labels_alone_and_probabilities(tmp_path):
    np.savez(tmp_path / "p.npz", probs=Z.softmax(1).numpy(), soft_labels=Z.softmax(1).numpy())
    content = load_logits(tmp_path / "p.npz")
    assert content.logits is None
    assert set(content.inputs) == {"probs", "soft_labels"}


def test_class_names_and_other_integer_types(tmp_path):
    np.savez(
        tmp_path / "n.npz",
        logits=Z.numpy().astype(np.float16),
        labels=Y.numpy().astype(np.uint8),
        class_names=np.array(["cat", "dog", "eel"]),
        unrelated=np.arange(3),
    )
    content = load_logits(tmp_path / "n.npz")
    assert content.class_names == ("cat", "dog", "eel")
    assert content.labels.dtype == torch.int64
    assert content.logits.dtype == torch.float16


def test_list_columns_of_parquet(tmp_path):
    table = pa.table({"logits": pa.array(Z.tolist(), pa.list_(pa.float32())), "labels": [1, 2]})
    pq.write_table(table, tmp_path / "list.parquet")
    torch.testing.assert_close(load_logits(tmp_path / "list.parquet").logits, Z)
    ragged = pa.table({"logits": pa.array([[1.0, 2.0], [3.0]]), "labels": [1, 2]})
    pq.write_table(ragged, tmp_path / "ragged.parquet")
    with pytest.raises(DataError, match="different lengths"):
        load_logits(tmp_path / "ragged.parquet")
    missing = pa.table({"logits": pa.array([[1.0, 2.0], None]), "labels": [1, 2]})
    pq.write_table(missing, tmp_path / "missing.parquet")
    with pytest.raises(DataError, match="1 missing"):
        load_logits(tmp_path / "missing.parquet")


def test_pickled_content_is_never_loaded(tmp_path):
    np.savez(tmp_path / "evil.npz", logits=np.array([{"a": 1}], dtype=object), labels=Y.numpy())
    with pytest.raises(DataError, match=r"evil\.npz"):
        load_logits(tmp_path / "evil.npz")


def test_unusable_files_are_named(tmp_path):
    cases = {
        "absent.npz": (None, "does not exist"),
        "text.csv": (b"1,2", "must end in"),
        "broken.npz": (b"PK\x03\x04 nonsense", "cannot be read as npz"),
        "broken.parquet": (b"PAR1 nonsense", "cannot be read as parquet"),
        "broken.safetensors": (b"\x00" * 20, "cannot be read as safetensors"),
    }
    for name, (data, message) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=message):
            load_logits(tmp_path / name)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"labels": Y}, "exactly one of 'logits' and 'probs'"),
        ({"logits": Z, "probs": Z, "labels": Y}, "exactly one of 'logits' and 'probs'"),
        ({"logits": Z}, "'labels' or 'soft_labels'"),
        ({"logits": Z[0], "labels": Y}, r"floating \[n, k\]"),
        ({"logits": Z, "labels": Y[:1]}, r"integers \[2\]"),
        ({"logits": Z, "labels": Y.float()}, "must be integers"),
        ({"logits": Z, "soft_labels": Z[:, :2].contiguous()}, "soft_labels must be floating"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, tensors, message):
    path = tmp_path / "wrong.safetensors"
    save_file({name: value.clone() for name, value in tensors.items()}, path)
    with pytest.raises(DataError, match=message):
        load_logits(path)


def test_as_many_class_names_as_classes(tmp_path):
    path = tmp_path / "n.npz"
    np.savez(path, logits=Z.numpy(), labels=Y.numpy(), class_names=np.array(["cat", "dog"]))
    with pytest.raises(DataError, match="2 class_names for 3 classes"):
        load_logits(path)


def test_arrays_of_another_machine(tmp_path):
    path = tmp_path / "n.npz"
    np.savez(path, logits=Z.numpy().astype(">f4"), labels=Y.numpy().astype(">u2"))
    content = load_logits(path)
    torch.testing.assert_close(content.logits, Z, rtol=0, atol=0)
    assert content.labels.tolist() == Y.tolist()


def test_saving_without_labels_is_refused(tmp_path):
    with pytest.raises(DataError, match="labels or soft_labels"):
        save_logits(tmp_path / "x.npz", logits=Z)
    with pytest.raises(DataError, match="must end in"):
        save_logits(tmp_path / "x.csv", logits=Z, labels=Y)
