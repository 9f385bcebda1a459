from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dp_runtime.core.device_copy import ALIGNMENT, all_on_device, on_device


def test_arrays_arrive_as_they_are_in_one_piece_of_memory() -> None:
    read_only = np.arange(5, dtype=np.int64)
    read_only.flags.writeable = False
    arrays: list[NDArray[Any]] = [
        read_only,
        np.zeros((0, 0), np.float32),
        np.arange(12, dtype=np.int32).reshape(3, 4),
        np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not contiguous
        np.array([True, False]),
    ]

    tensors = all_on_device(arrays, torch.device("cpu"))

    for array, tensor in zip(arrays, tensors, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array, strict=True)
        assert tensor.is_contiguous()
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert len(storages) == 1
    starts = [tensor.storage_offset() * tensor.element_size() for tensor in tensors]
    assert all(start % ALIGNMENT == 0 for start in starts)
    tensors[0].zero_()
    assert read_only[4] == 4, "a tensor is a copy of its array"


def test_no_array_is_no_tensor() -> None:
    assert all_on_device([], torch.device("cpu")) == ()


def test_an_array_without_elements_can_be_viewed_in_another_dtype() -> None:
    rows = on_device(np.full((0, 8), -1, np.int16), torch.device("cpu"))
    assert rows.view(torch.float32).shape == (0, 4)
