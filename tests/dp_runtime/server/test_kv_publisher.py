"""KV events over ZeroMQ, read as vLLM's subscribers read them."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Empty, SimpleQueue
from time import sleep
from typing import Any

import msgpack
import pytest
import zmq

from dp_runtime.core.rank_events.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEventBatch,
)
from dp_runtime.server.config import ServerConfig
from dp_runtime.server.kv_publisher import MAX_REPLAYED, KvEventPublisher

STORED = BlockStored((b"a" * 16,), None, (5, 6, 7, 8), 4)
NEXT = BlockStored((b"b" * 16,), b"a" * 16, (9, 9, 9, 9), 4)
BATCHES = [
    KvEventBatch(1.5, (STORED, NEXT), 0),
    KvEventBatch(2.5, (BlockRemoved((b"b" * 16, b"a" * 16)), AllBlocksCleared()), 3),
]
WAIT_MS = 20_000


class Published:
    """A publisher, what it is to publish, and a subscriber."""

    def __init__(self, directory: str) -> None:
        self.waiting: SimpleQueue[KvEventBatch] = SimpleQueue()
        self.replays = f"ipc://{directory}/replay"
        config = ServerConfig(
            kv_events_endpoint=f"ipc://{directory}/events",
            kv_events_replay_endpoint=self.replays, kv_events_topic="kv",
        )  # fmt: skip
        self.publisher = KvEventPublisher(config)
        self.context = zmq.Context()
        self.subscriber = self.context.socket(zmq.SUB)
        self.subscriber.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        self.subscriber.setsockopt(zmq.SUBSCRIBE, b"kv")
        self.subscriber.connect(self.publisher.endpoint)

    def take(self, timeout_s: float) -> tuple[KvEventBatch, ...]:
        try:
            return (self.waiting.get(timeout=timeout_s),)
        except Empty:
            return ()

    def replayed(self, first: int) -> list[tuple[int, Any]]:
        asking = self.context.socket(zmq.DEALER)
        asking.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        asking.connect(self.replays)
        asking.send_multipart((b"", first.to_bytes(8, "big")))
        found = list[tuple[int, Any]]()
        while True:
            _, number, content = asking.recv_multipart()
            if not content:
                assert int.from_bytes(number, "big", signed=True) == -1
                asking.close(0)
                return found
            found.append((int.from_bytes(number, "big"), msgpack.unpackb(content)))


@pytest.fixture
def published(tmp_path: Any) -> Iterator[Published]:
    made = Published(str(tmp_path))
    made.publisher.start(made.take)
    yield made
    made.publisher.close()
    made.context.destroy(linger=0)


WRITTEN = [
    [1.5, [["BlockStored", [b"a" * 16], None, [5, 6, 7, 8], 4, None, "GPU"],
           ["BlockStored", [b"b" * 16], b"a" * 16, [9, 9, 9, 9], 4, None, "GPU"]], 0],
    [2.5, [["BlockRemoved", [b"b" * 16, b"a" * 16], "GPU"], ["AllBlocksCleared"]], 3],
]  # fmt: skip


def test_subscribers_get_numbered_batches_and_replays(published: Published) -> None:
    number = 0
    published.subscriber.setsockopt(zmq.RCVTIMEO, 50)
    while True:  # until the subscription has arrived
        published.waiting.put(BATCHES[0])
        try:
            topic, sent, content = published.subscriber.recv_multipart()
            break
        except zmq.Again:
            number += 1
    published.subscriber.setsockopt(zmq.RCVTIMEO, WAIT_MS)
    first = int.from_bytes(sent, "big")
    assert (topic, msgpack.unpackb(content)) == (b"kv", WRITTEN[0])
    published.waiting.put(BATCHES[1])
    while msgpack.unpackb(content) != WRITTEN[1]:
        _, sent, content = published.subscriber.recv_multipart()
    last = int.from_bytes(sent, "big")
    assert last > first
    every = published.replayed(0)
    assert [each for each, _ in every] == [*range(last + 1)]
    assert every[0][1] == WRITTEN[0]
    assert published.replayed(last) == [(last, WRITTEN[1])]
    assert published.replayed(last + 1) == []


def test_the_longest_replay_is_whole(published: Published) -> None:
    """ZeroMQ keeps 1,000 messages for a socket by itself, and drops others without a word."""
    for _ in range(MAX_REPLAYED + 5):
        published.waiting.put(BATCHES[0])
    while not published.waiting.empty():
        sleep(0.01)
    numbers = [each for each, _ in published.replayed(0)]
    assert len(numbers) == MAX_REPLAYED
    assert numbers == [*range(numbers[0], numbers[0] + MAX_REPLAYED)]


@pytest.mark.parametrize("field", ["kv_events_endpoint", "kv_events_replay_endpoint"])
def test_an_endpoint_that_can_not_be_bound_is_named(field: str) -> None:
    given: dict[str, Any] = {"kv_events_endpoint": "tcp://127.0.0.1:*"} | {field: "smoke://signal"}
    with pytest.raises(ValueError, match=f"{field}: 'smoke://signal' is not allowed"):
        KvEventPublisher(ServerConfig(**given))


def test_replays_need_events() -> None:
    with pytest.raises(
        ValueError, match=r"kv_events_replay_endpoint: .* without kv_events_endpoint"
    ):
        ServerConfig(kv_events_replay_endpoint="tcp://*:5558")
