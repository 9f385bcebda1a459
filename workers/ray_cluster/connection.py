"""This process's connection to a Ray cluster, which the engines of the process share."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from time import monotonic

from dp_runtime.config import EngineConfig
from dp_runtime.errors import StartError, require
from workers.deadline import result_within
from workers.ray_cluster.address import ClusterAddress
from workers.ray_cluster.errors import cause_of
from workers.start_errors import explained

WATCH_S = 0.2
SHUTDOWN_S = 10.0
LOST = "Ray was shut down in this process (ray.shutdown()), or its cluster has ended"

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_current: RayConnection | None = None


class RayConnection:
    """A connection with a thread of its own, which makes it, watches it and ends it.

    A connection that the user has made is watched and never ended.

    NOTE: the kernel ends the processes of a cluster that is started here together with the
    *thread* that started them, so that thread lives as long as the connection.
    """

    def __init__(self, address: ClusterAddress | None) -> None:
        """Join or start the cluster at an address; None is the user's own connection."""
        self.address = address
        self.num_users = 0
        self.started: Future[None] = Future()
        self._identity: str | None = None
        self._released = threading.Event()
        self._on_loss: list[Callable[[str], None]] = []
        self._thread = threading.Thread(target=self._live, name="ray-connection", daemon=True)
        self._thread.start()

    @property
    def starts_cluster(self) -> bool:
        return self.address is not None and self.address.text == "local"

    @property
    def usable(self) -> bool:
        """It serves now, or will: it is neither released nor lost, nor has its start failed."""
        alive = self._thread.is_alive() and not self._released.is_set()
        return alive and (not self.started.done() or self.connected)

    @property
    def connected(self) -> bool:
        return self._identity is not None and _identity() == self._identity

    def on_loss(self, tell: Callable[[str], None]) -> None:
        """Have `tell` hear why, in the connection's thread, should the connection end too early."""
        self._on_loss.append(tell)

    def release(self) -> None:
        """Give up one use; the last one ends a connection that was made here."""
        with _lock:
            self.num_users -= 1
            if self.num_users:
                return
            self._released.set()
        if self.started.done():
            self.join(monotonic() + SHUTDOWN_S)

    def join(self, deadline: float) -> bool:
        """Wait for the end of the thread, and say whether it has ended."""
        self._thread.join(max(deadline - monotonic(), 0.0))
        return not self._thread.is_alive()

    def _live(self) -> None:
        import ray

        try:
            if self.address is not None:
                _init(self.address)
            self._identity = _identity()
        except BaseException as error:
            self.started.set_exception(error)
            return
        self.started.set_result(None)
        while not self._released.wait(WATCH_S):
            if _identity() != self._identity:
                for tell in self._on_loss:
                    tell(LOST)
                return
        if self.address is not None and _identity() == self._identity:
            ray.shutdown()


def connect(config: EngineConfig, deadline: float) -> RayConnection:
    """Use this process's connection, else make one to the cluster that the config names.

    NOTE: who may talk to a cluster runs code as its user. One started here listens on loopback
    only, and asks for the user's token (~/.ray) unless RAY_AUTH_MODE says no.
    """
    address = ClusterAddress.from_config(config, os.environ)
    connection = _use(config, address, deadline)
    phase = f"connect to Ray ({address.text})"
    try:
        result_within(deadline, phase, connection.started)
    except StartError:
        connection.release()
        raise
    except (KeyboardInterrupt, SystemExit):
        connection.release()
        if connection.starts_cluster:  # processes that are half started outlive this one by minutes
            connection.join(monotonic() + SHUTDOWN_S)
        raise
    except Exception as error:
        connection.release()
        reason = cause_of(error)
        _log.info("%s: %s", phase, error)
        if connection.starts_cluster:
            reason = explained(error) if isinstance(error, OSError) else reason
            raise StartError(f"no Ray cluster could be started here: {reason}") from error
        text = f"ray_address: no cluster answers at {address.text!r}: {reason}"
        raise StartError(text) from error
    _take_sigterm_back()
    return connection


def _use(config: EngineConfig, address: ClusterAddress, deadline: float) -> RayConnection:
    """Count one more user of the connection that there is, or of a new one."""
    global _current
    import ray

    with _lock:
        if _current is not None and not _current.usable:
            if not _current.join(deadline):
                raise StartError("connect to Ray: an earlier attempt has not come to its end yet")
            _current = None
        if _current is None and ray.is_initialized():
            _current = RayConnection(None)
        if _current is None:
            address = address.found()
            address.probe(deadline)
            _current = RayConnection(address)
            _end_on_sigterm()
        elif config.ray_address is not None:
            _check_same(_current, address)
        _current.num_users += 1
        return _current


def _check_same(connection: RayConnection, wanted: ClusterAddress) -> None:
    """Raise ValueError for a cluster other than the one that this process is connected to."""
    if connection.address is not None:
        present = connection.address.text
        same = present == wanted.text or wanted.text == "auto"
    else:
        import ray

        present = "" if is_client() else ray.get_runtime_context().gcs_address
        same = wanted.is_client or not wanted.port or present.endswith(f":{wanted.port}")
    allowed = f"a process has one connection, and this one is connected to {present!r} already"
    require(same, "ray_address", wanted.text, allowed)


def _init(address: ClusterAddress) -> None:
    import ray
    from ray._private import ray_constants

    logging.getLogger("ray._private.worker").addFilter(_is_not_about_sigterm)
    if address.text == "local":
        # Ray binds to loopback where clusters can't span hosts; on Linux nothing else says so.
        spans_hosts = ray_constants.ENABLE_RAY_CLUSTER
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            ray.init("local", include_dashboard=False, log_to_driver=False, configure_logging=False)
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = spans_hosts
    else:
        ray.init(address.text, log_to_driver=False, logging_level=logging.WARNING)


def _is_not_about_sigterm(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("SIGTERM handler is not set")


def _end_on_sigterm() -> None:
    """Have SIGTERM unwind the program, as ray.init does where it runs in the main thread."""
    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))


def _take_sigterm_back() -> None:
    """Have Python's handler again, in whose place Ray's core puts one that aborts the process."""
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread() and callable(handler):
        signal.signal(signal.SIGTERM, handler)


def _identity() -> str | None:
    """Return what tells this process's connection from a later one; None without one."""
    import ray

    if not ray.is_initialized():
        return None
    if is_client():  # whose server would have to be asked
        return "client"
    with suppress(Exception):  # it ends just now
        return str(ray.get_runtime_context().get_job_id())
    return None


def is_client() -> bool:
    """The connection is that of a Ray Client (ray://), which speaks through a server."""
    from ray._private.client_mode_hook import client_mode_should_convert

    return bool(client_mode_should_convert())
