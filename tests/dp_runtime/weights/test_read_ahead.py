"""What is read ahead is what the file has, whatever the sizes of blocks and parts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.weights import read_ahead
from dp_runtime.weights.read_ahead import ReadAhead

CPU = torch.device("cpu")
CONTENT = bytes(range(251)) * 8


@pytest.fixture(scope="module")
def descriptor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    path: Path = tmp_path_factory.mktemp("ahead") / "file"
    path.write_bytes(CONTENT)
    opened = os.open(path, os.O_RDONLY)
    yield opened
    os.close(opened)


@given(
    block=st.integers(1, 300),
    num_blocks=st.integers(1, 5),
    parts=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 900)), max_size=12),
)
def test_parts_in_order_are_what_the_file_has(
    descriptor: int, block: int, num_blocks: int, parts: list[tuple[int, int]]
) -> None:
    """Parts are (bytes left out, bytes read)."""
    with mock.patch.multiple(read_ahead, BLOCK=block, NUM_BLOCKS=num_blocks):
        ahead, offset = ReadAhead(descriptor, len(CONTENT), CPU), 0
        for gap, size in parts:
            offset = min(offset + gap, len(CONTENT))
            into = torch.zeros(min(size, len(CONTENT) - offset), dtype=torch.uint8)
            ahead.copy(offset, into)
            assert bytes(into.tolist()) == CONTENT[offset : offset + len(into)]
            offset += len(into)
        ahead.close()


def test_a_block_that_was_given_up_is_not_read_again(descriptor: int) -> None:
    with mock.patch.multiple(read_ahead, BLOCK=100, NUM_BLOCKS=2):
        ahead = ReadAhead(descriptor, len(CONTENT), CPU)
        ahead.copy(250, torch.zeros(1, dtype=torch.uint8))
        with pytest.raises(AssertionError, match="in order"):
            ahead.copy(199, torch.zeros(1, dtype=torch.uint8))
        ahead.close()


def test_a_file_that_is_too_short_is_an_error(descriptor: int) -> None:
    with mock.patch.multiple(read_ahead, BLOCK=100, NUM_BLOCKS=2):
        ahead = ReadAhead(descriptor, len(CONTENT) + 1, CPU)
        with pytest.raises(AssertionError, match="the file ended at byte 2008 of 2009"):
            ahead.copy(len(CONTENT) - 1, torch.zeros(2, dtype=torch.uint8))
        ahead.close()
