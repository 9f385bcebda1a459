"""Buffers that all ranks grow together, and the order of operations; the GPU is pretended."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from collectives.peer_to_peer import buffers, rows
from collectives.peer_to_peer.buffers import MIN_BYTES, PeerBuffer
from collectives.peer_to_peer.rows import GATHER, SCATTER, Alternation, PeerRows
from collectives.watchdog import Watchdog
from dp_runtime.host.capturing import capturing
from tests.workers.leftovers import wait_until


@dataclass(eq=False)
class Memory:
    num_bytes: int
    events: list[str] = field(default_factory=list)

    @property
    def memory(self) -> Memory:
        return self

    def unmap(self) -> None:
        self.events.append("unmapped")

    def free(self) -> None:
        self.events.append("freed")


@dataclass
class Device:
    capturing: bool = False
    made: list[Memory] = field(default_factory=list)

    def make(self, num_bytes: int, rank: int, all_gather_bytes: object) -> Memory:
        self.made.append(Memory(num_bytes))
        return self.made[-1]

    def meet(self, own: bytes) -> list[bytes]:
        self.made[-1].events.append("all ranks have unmapped")
        return [own]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(buffers.Shared, "make", device.make)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: device.capturing)
    return device


def test_a_buffer_grows_once_no_rank_has_the_old_one_mapped(device: Device) -> None:
    buffer = PeerBuffer(0, device.meet)
    first = buffer.reserve(0)
    assert first.memory.num_bytes == MIN_BYTES
    assert buffer.reserve(MIN_BYTES) is first
    second = buffer.reserve(MIN_BYTES + 1)
    assert second.memory.num_bytes == 2 * MIN_BYTES
    assert device.made[0].events == ["unmapped", "all ranks have unmapped", "freed"]
    buffer.unmap()
    assert device.made[1].events == ["unmapped"]


def test_a_buffer_that_graphs_write_to_is_kept(device: Device) -> None:
    buffer = PeerBuffer(0, device.meet)
    buffer.reserve(8)
    device.capturing = True
    buffer.reserve(8)
    with pytest.raises(AssertionError, match=f"over {2 * MIN_BYTES} bytes that were never used"):
        buffer.reserve(2 * MIN_BYTES)
    device.capturing = False
    buffer.reserve(2 * MIN_BYTES)
    assert device.made[0].events == []
    buffer.unmap()
    assert [memory.events for memory in device.made] == [["unmapped"], ["unmapped"]]


def test_all_graphs_exchange_rows_through_one_buffer(device: Device) -> None:
    """A rank that replays one captured over smaller memory would not meet a peer's later one."""
    buffer = PeerBuffer(0, device.meet)
    buffer.reserve(8)
    device.capturing = True
    buffer.reserve(8)
    device.capturing = False
    buffer.reserve(2 * MIN_BYTES)  # an eager step of more rows, whose peers do the same
    device.capturing = True
    with pytest.raises(AssertionError, match="other graphs write to the memory before"):
        buffer.reserve(8)


def test_which_operations_repeat() -> None:
    alternation = Alternation()
    order = (GATHER, SCATTER, SCATTER, GATHER, GATHER, GATHER)
    assert [alternation.repeats(each) for each in order] == [False, False, True, False, True, True]


def test_an_abort_ends_kernels_at_once_and_waits_for_the_device_after_a_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[object] = []
    monkeypatch.setattr(rows, "CAPTURE_S", 20.0)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda of: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    peer = PeerRows.__new__(PeerRows)
    watchdog, stop = Watchdog(60.0, lambda error: None), torch.zeros(1)
    own: dict[str, Any] = {
        "_aborting": threading.Lock(), "_aborted": False, "_side": None, "_watch": watchdog,
        "_stop": stop, "_one": torch.ones(1),
    }  # fmt: skip
    vars(peer).update(own)
    with capturing():
        thread = threading.Thread(target=peer.abort)
        thread.start()
        wait_until(lambda: bool(stop.item()), "kernels are told to stop")
        thread.join(0.2)
        assert not waited
    thread.join()
    assert len(waited) == 1
