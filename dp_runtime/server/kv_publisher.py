"""KvEventPublisher: KV events over ZeroMQ, as routers outside read them of vLLM."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

import msgpack
import zmq

from dp_runtime.core.rank_events.kv_events import (
    BlockRemoved,
    BlockStored,
    KvEvent,
    KvEventBatch,
)
from dp_runtime.errors import EngineClosed, RankFailed, require
from dp_runtime.server.config import ServerConfig

logger = logging.getLogger(__name__)

WAIT_S = 0.1
CLOSE_S = 5.0
MAX_REPLAYED = 10_000  # batches that are kept for those who missed some
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
MEDIUM = "GPU"  # vLLM's name of the pages that attention reads

Take = Callable[[float], tuple[KvEventBatch, ...]]


class KvEventPublisher:
    """Publishes (topic, number, batch) to any number of subscribers, in a thread of its own.

    Who missed numbers asks the replay socket for all from one on; ValueError for a bad endpoint.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._topic = (config.kv_events_topic or "").encode()
        self._context = zmq.Context()
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=MAX_REPLAYED)
        self._numbers = count()
        self._over = threading.Event()
        try:
            self._events = self._bound(zmq.PUB, "kv_events_endpoint", config.kv_events_endpoint)
            replay = "kv_events_replay_endpoint", config.kv_events_replay_endpoint
            self._replays = None if replay[1] is None else self._bound(zmq.ROUTER, *replay)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread: threading.Thread | None = None

    @property
    def endpoint(self) -> str:
        return self._events.getsockopt_string(zmq.LAST_ENDPOINT)

    def start(self, take: Take) -> None:
        run = lambda: self._run(take)  # noqa: E731
        self._thread = threading.Thread(target=run, name="kv-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        self._context.destroy(linger=0)

    def _bound(self, kind: int, field: str, endpoint: str | None) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.sndhwm = MAX_REPLAYED + 1  # a replay with its end: ZeroMQ drops what is beyond
        try:
            socket.bind(endpoint or "")
        except zmq.ZMQError as error:
            require(False, field, endpoint, f"an endpoint that ZeroMQ can bind ({error})")
        return socket

    def _run(self, take: Take) -> None:
        with suppress(EngineClosed, RankFailed):  # its callers hear of that
            while not self._over.is_set():
                self._answer_replays()
                for batch in take(WAIT_S):
                    self._publish(batch)

    def _publish(self, batch: KvEventBatch) -> None:
        number, content = next(self._numbers), packed(batch)
        self._sent.append((number, content))
        self._events.send_multipart((self._topic, number.to_bytes(8, "big"), content))

    def _answer_replays(self) -> None:
        while self._replays is not None and self._replays.poll(0):
            client, *rest = self._replays.recv_multipart()
            if len(rest) != 2 or len(rest[1]) != 8:
                logger.warning("a replay is asked for with 8 bytes, not with %s", rest)
                continue
            first = int.from_bytes(rest[1], "big")
            for number, content in [each for each in self._sent if each[0] >= first]:
                self._replays.send_multipart((client, b"", number.to_bytes(8, "big"), content))
            self._replays.send_multipart((client, b"", END_OF_REPLAY, b""))


def packed(batch: KvEventBatch) -> bytes:
    """Write a batch as vLLM's msgspec structs with array_like=True are written."""
    events = [_as_array(event) for event in batch.events]
    content: bytes = msgpack.packb([batch.ts, events, batch.data_parallel_rank])
    return content


def _as_array(event: KvEvent) -> list[Any]:
    name = type(event).__name__
    match event:
        case BlockStored(hashes, parent, token_ids, block_size):
            no_lora = None
            return [name, hashes, parent, token_ids, block_size, no_lora, MEDIUM]
        case BlockRemoved(hashes):
            return [name, hashes, MEDIUM]
    return [name]
