"""The store in which ranks of torch.distributed find each other, and which they leave empty."""

from __future__ import annotations

import socket
from datetime import timedelta
from urllib.parse import urlparse

from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.rendezvous import rendezvous


def open_store(
    init_method: str,
    dp_rank: int,
    dp_size: int,
    timeout_s: float,
    listener: socket.socket | None = None,
) -> Store:
    """Open the store; rank 0 hosts it, on that address only, while torch's own listens on all."""
    url, wait = urlparse(init_method), timedelta(seconds=timeout_s)
    if url.scheme != "tcp":
        store: Store = next(rendezvous(init_method, dp_rank, dp_size, timeout=wait))[0]
        return store
    host, port = str(url.hostname), url.port or 0
    fd = None
    if dp_rank == 0:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        fd = (listener or socket.create_server((host, port), family=family)).detach()
    return TCPStore(host, port, dp_size, dp_rank == 0, wait, master_listen_fd=fd)


def empty_store(store: Store) -> None:
    """Delete what the ranks needed to meet, once all have; only rank 0 of a TCP store needs to."""
    if isinstance(store, TCPStore):
        for key in store.list_keys():
            store.delete_key(key)
