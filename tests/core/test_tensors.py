"""Arrays of any kind become tensors without a change of value, or one clear line."""

import warnings

import numpy as np
import pytest
import torch

from diffcal.core.tensors import as_tensor, lay_out
from diffcal.errors import DataError

VALUES = np.array([[0.1, 0.7], [0.3, -2.5], [1e300, 4.0]])

KINDS = {
    "lists": VALUES.tolist(),
    "reversed": VALUES[::-1][::-1][:, ::-1][:, ::-1],
    "big-endian": VALUES.astype(">f8"),
    "long double": VALUES.astype(np.longdouble),
    "Fortran order": np.asfortranarray(VALUES),
    "strided": np.repeat(VALUES, 2, axis=1)[:, ::2],
    "tensor with gradient": torch.tensor(VALUES, requires_grad=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_no_value_changes(name):
    made = as_tensor(KINDS[name], "values")
    assert made.dtype == torch.float64
    assert not made.requires_grad
    np.testing.assert_array_equal(made.numpy(), VALUES)


def test_rows_in_reverse():
    np.testing.assert_array_equal(as_tensor(VALUES[::-1], "values").numpy(), VALUES[::-1])


def test_data_frames():
    pandas = pytest.importorskip("pandas")
    np.testing.assert_array_equal(as_tensor(pandas.DataFrame(VALUES), "values").numpy(), VALUES)
    assert as_tensor(pandas.Series([3, 1]), "labels").tolist() == [3, 1]


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.uint64])
def test_unsigned_integers_are_ones_that_torch_computes_with(kind):
    array = np.array([0, 1, 40_000], dtype=kind)
    for given in (array, torch.from_numpy(array)):
        made = as_tensor(given, "labels")
        assert made.dtype == torch.int64
        assert made.tolist() == [0, 1, 40_000]


def test_a_read_only_array_is_taken_without_a_warning_or_a_copy():
    array = VALUES.copy()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = as_tensor(array, "values")
    assert made.data_ptr() == array.ctypes.data


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["cat", "dog"], "labels must be numbers, got an array of <U3"),
        ([None, 1.0], "labels must be numbers, got an array of object"),
        ([[1.0], [1.0, 2.0]], "labels must be an array of numbers"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused_by_name(values, message):
    with pytest.raises(DataError, match=message):
        as_tensor(values, "labels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lay_out_copies_between_strides_without_a_gradient(dtype):
    values = torch.arange(12, dtype=dtype).view(3, 4).requires_grad_()
    out = torch.zeros(4, 3, dtype=dtype)
    assert lay_out(values.t(), out) is out
    assert not out.requires_grad
    assert torch.equal(out, values.detach().t())
    wide = torch.zeros(3, 4, dtype=torch.float64)
    assert torch.equal(lay_out(values, wide), values.detach().double())
