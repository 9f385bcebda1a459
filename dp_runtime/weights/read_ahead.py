"""ReadAhead: brings a file of the host's memory to a device, block after block, threads ahead."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

# A copy from pages that the driver has not pinned runs at a tenth of the bus.
BLOCK = 32 << 20  # bytes
NUM_BLOCKS = 16
NUM_THREADS = 8  # one fills memory slower than a GPU's bus takes it


class ReadAhead:
    """Reads a file once, in the order of its bytes; `close` ends the threads."""

    def __init__(self, descriptor: int, num_bytes: int, device: torch.device) -> None:
        self._descriptor, self._num_bytes, self._device = descriptor, num_bytes, device
        self._num_blocks = -(-num_bytes // BLOCK)
        size = min(BLOCK, num_bytes)
        self._buffers = [
            _Buffer(torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda"))
            for _ in range(min(NUM_BLOCKS, self._num_blocks))
        ]
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="read-ahead")
        self._filled = [
            self._threads.submit(self._fill, block) for block in range(len(self._buffers))
        ]
        self._block = 0  # the first that is not given up

    def copy(self, offset: int, into: Tensor) -> None:
        """Queue a copy to the device's `into`, [n] uint8; offsets never go back to a block."""
        end = offset + len(into)
        assert offset >= self._block * BLOCK, "bytes are read in order"
        while offset < end:
            block, start = divmod(offset, BLOCK)
            self._give_up_until(block)
            self._filled[block % len(self._buffers)].result()
            part = min(end - offset, BLOCK - start)
            source = self._buffers[block % len(self._buffers)].content[start : start + part]
            into[len(into) - (end - offset) :][:part].copy_(source, non_blocking=True)
            offset += part

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # copies read the buffers

    def _give_up_until(self, block: int) -> None:
        for done in range(self._block, block):
            place = done % len(self._buffers)
            self._filled[place].result()
            if self._device.type == "cuda":
                self._buffers[place].copied = torch.cuda.current_stream(self._device).record_event()
            self._filled[place] = self._refill(place, done + len(self._buffers))
        self._block = block

    def _refill(self, place: int, block: int) -> Future[None]:
        if block >= self._num_blocks:
            return self._filled[place]
        return self._threads.submit(self._fill, block)

    def _fill(self, block: int) -> None:
        buffer = self._buffers[block % len(self._buffers)]
        if buffer.copied is not None:
            buffer.copied.synchronize()
        start = block * BLOCK
        content = buffer.content.numpy().data[: self._num_bytes - start]
        while content:
            count = os.preadv(self._descriptor, [content], start)
            assert count, f"the file ended at byte {start} of {self._num_bytes}"
            start, content = start + count, content[count:]


class _Buffer:
    def __init__(self, content: Tensor) -> None:
        self.content = content  # [BLOCK] uint8, pinned if a GPU reads it
        self.copied: torch.cuda.Event | None = None  # once the device needs it no more
