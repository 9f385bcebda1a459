"""AbortChannel: tells all ranks of an abort and of the orderly end, over TCP between every two."""

from __future__ import annotations

import hashlib
import hmac
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from urllib.parse import urlparse

from torch._C._distributed_c10d import Store

_REASON_BYTES = 512
_TOKEN_BYTES = 16
_LEAVING = ""  # sent in place of a reason


def own_address(init_method: str) -> str:
    """Return the address at which peers reach this host; loopback for file://."""
    url = urlparse(init_method)
    if url.hostname is None:
        return "127.0.0.1"
    family, kind, _, _, target = socket.getaddrinfo(url.hostname, url.port, type=socket.SOCK_DGRAM)[
        0
    ]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing, picks the interface
        return str(probe.getsockname()[0])


class AbortChannel:
    """Connects to all ranks, then calls on_alarm(reason) if a peer sounds.

    Raises TimeoutError or a store error if a rank is missing after timeout_s. The secret comes
    through the launcher, since anyone may read the store; connections without it are dropped.
    """

    def __init__(
        self,
        store: Store,
        dp_rank: int,
        dp_size: int,
        address: str,
        timeout_s: float,
        secret: bytes,
        on_alarm: Callable[[str], None],
    ) -> None:
        self._on_alarm = on_alarm
        self._all_left = threading.Event()
        self._peers = _connect_all(store, dp_rank, dp_size, address, timeout_s, secret)
        self._quit, self._quit_seen = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="alarm-line", daemon=True)
        self._thread.start()

    def sound(self, reason: str) -> None:
        """Tell every peer; a peer that is gone is left out, one that is stopped reads it later."""
        message = reason.encode()[:_REASON_BYTES].ljust(_REASON_BYTES, b"\0")
        for peer in self._peers:
            with suppress(OSError):
                peer.sendall(message)

    def leave(self, timeout_s: float) -> None:
        """Tell every peer that this rank is done; waits for all of them, timeout_s at most."""
        self.sound(_LEAVING)
        self._all_left.wait(timeout_s)

    def close(self) -> None:
        """End the watch and the connections; NOTE: not from on_alarm, which runs in that watch."""
        self._quit.close()
        self._thread.join()
        for end in (*self._peers, self._quit_seen):
            end.close()

    def _watch(self) -> None:
        staying = set(self._peers)
        with selectors.DefaultSelector() as selector:
            for end in (*self._peers, self._quit_seen):
                selector.register(end, selectors.EVENT_READ)
            while True:
                if not staying:
                    self._all_left.set()
                for key, _ in selector.select():
                    if key.fileobj is self._quit_seen:
                        return
                    peer = key.fileobj
                    assert isinstance(peer, socket.socket)
                    message = _receive(peer, _REASON_BYTES)
                    reason = message.rstrip(b"\0").decode(errors="replace")
                    if reason != _LEAVING:
                        self._on_alarm(reason)
                        continue
                    staying.discard(peer)
                    if not message:  # the peer has closed its group, or is gone
                        selector.unregister(peer)


def _connect_all(
    store: Store, dp_rank: int, dp_size: int, address: str, timeout_s: float, secret: bytes
) -> list[socket.socket]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=dp_size) as listener:
        listener.settimeout(timeout_s)
        store.set_timeout(timedelta(seconds=timeout_s))
        store.set(f"alarm/{dp_rank}", str(listener.getsockname()[1]) + " " + address)
        token = hashlib.sha256(secret).digest()[:_TOKEN_BYTES]
        peers = []
        for rank in range(dp_rank):
            port, host = store.get(f"alarm/{rank}").decode().split()
            peer = socket.create_connection((host, int(port)), timeout_s)
            peer.sendall(token)
            peers.append(peer)
        return peers + _admit(listener, token, dp_size - 1 - dp_rank, timeout_s)


def _admit(
    listener: socket.socket, token: bytes, count: int, timeout_s: float
) -> list[socket.socket]:
    """Accept so many peers that know the token; strangers hold up nobody, whatever they send."""
    deadline = time.monotonic() + timeout_s
    peers: list[socket.socket] = []
    heard: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(peers) < count:
            if not (ready := selector.select(max(0.0, deadline - time.monotonic()))):
                raise TimeoutError(f"{count - len(peers)} ranks are missing")
            for key, _ in ready:
                if key.fileobj is listener:
                    one, _ = listener.accept()
                    one.setblocking(False)
                    heard[one] = b""
                    selector.register(one, selectors.EVENT_READ)
                    continue
                one = key.fileobj  # type: ignore[assignment]
                more = _read(one, _TOKEN_BYTES - len(heard[one]))
                heard[one] += more
                if more and len(heard[one]) < _TOKEN_BYTES:
                    continue
                selector.unregister(one)
                if hmac.compare_digest(heard.pop(one), token):
                    one.settimeout(timeout_s)
                    peers.append(one)
                else:
                    one.close()
    for stranger in heard:
        stranger.close()
    return peers


def _read(peer: socket.socket, size: int) -> bytes:
    try:
        return peer.recv(size)
    except OSError:
        return b""


def _receive(peer: socket.socket, size: int) -> bytes:
    """Read exactly size bytes; b"" if the connection ends before."""
    message = b""
    with suppress(OSError):
        while len(message) < size and (more := peer.recv(size - len(message))):
            message += more
    return message if len(message) == size else b""
