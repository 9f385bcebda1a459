"""ForkServer: a process that has imported torch once and forks ranks, each in milliseconds.

Unlike multiprocessing's it imports no script of the caller, does not search the working directory
first, and gives children the environment of now.
"""

from __future__ import annotations

import ctypes
import gc
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from typing import NoReturn

from collectives.session import VARIABLE, session_token
from dp_runtime.errors import StartError

FORK_S = 10.0  # for a server that has forked before
GRACE_S = 1.0  # for children to end by themselves once the driver has ended
TELL_S = 2.0  # for the server to tell of a child that has ended
NOT_TOLD = 255  # exit status where the server ended before it could tell
_STATUS = struct.Struct("=i")  # first the pid, then the exit status
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15

Target = Callable[[Connection, int], None]  # a channel to the driver, and the driver's pidfd


def import_path() -> str:
    """Return sys.path as PYTHONPATH; without its empty entry ranks skip the working directory."""
    return os.pathsep.join(entry or os.getcwd() for entry in sys.path)


def rank_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": import_path(), VARIABLE: session_token()}


def resume_with_parent_death() -> None:
    """Let a process that is stopped go on when its parent dies, and see that."""
    harmless = signal.SIGCONT  # it also comes when the thread ends that started this process
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, harmless)


@dataclass(frozen=True)
class ForkRequest:
    target: str  # `module:function` of kind Target
    name: str  # which `ps -o comm` shows
    environment: dict[str, str]
    directory: str


class ForkedProcess:
    """A child of the server; it is known by a pidfd, which no later process can take over."""

    def __init__(
        self, pid: int, pidfd: int, status: socket.socket, server_stopped: threading.Event
    ) -> None:
        """Share `server_stopped` with the server's other children, of which one waits for it."""
        self.pid, self._status = pid, status
        self._pidfd: int | None = pidfd
        self._server_stopped = server_stopped
        self._code: int | None = None
        self._lock, self._closing = threading.Lock(), threading.Lock()

    def kill(self) -> None:
        with self._closing, suppress(ProcessLookupError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, negative for a signal; subprocess.TimeoutExpired if it runs."""
        with self._lock:
            if self._code is None:
                assert self._pidfd is not None, "it is open until the status is known"
                if not wait([self._status, self._pidfd], timeout):
                    raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
                told = b""
                if wait([self._status], 0.0 if self._server_stopped.is_set() else TELL_S):
                    told = self._status.recv(_STATUS.size)
                else:
                    self._server_stopped.set()
                self._code = _STATUS.unpack(told)[0] if told else NOT_TOLD
                self._status.close()
                self._close()
            return self._code

    def _close(self) -> None:
        with self._closing:
            if self._pidfd is not None:
                os.close(self._pidfd)
                self._pidfd = None

    def __del__(self) -> None:
        self._close()


class ForkServer:
    """Forks processes from one that has imported `preload`; it ends with this process.

    Children get this process's environment and directory of now, and sessions of their own.
    """

    def __init__(self, *preload: str) -> None:
        self.driver, self.import_path = os.getpid(), import_path()
        self._lock = threading.Lock()
        self._has_forked = False  # it has imported all
        self._closed = False
        self._stopped = threading.Event()  # it could not tell of a child, and may go on later
        self._control, theirs = socket.socketpair()
        self._requests = Connection(os.dup(self._control.fileno()))
        fds = (theirs.fileno(), os.pidfd_open(self.driver))
        # OpenBLAS starts its threads at import, and no thread may be alive at a fork.
        environment = rank_environment() | {"OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "workers.forkserver"),
                *(session_token(), *map(str, fds), *preload),
            ],
            pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True, env=environment,
        )  # fmt: skip
        theirs.close()
        os.close(fds[1])

    @property
    def usable(self) -> bool:
        """It runs, belongs to this process, and imports what this process imports now."""
        mine = (self.driver, self.import_path) == (os.getpid(), import_path())
        return mine and self._process.poll() is None

    def fork(self, target: str, name: str, timeout_s: float) -> tuple[ForkedProcess, Connection]:
        """Start a child; returns it and the driver's end of its channel. Raises StartError."""
        request = ForkRequest(target, name, rank_environment(), os.getcwd())
        channel, its_channel = socket.socketpair()
        status, its_status = socket.socketpair()
        with its_channel, its_status, self._lock, suppress(BrokenPipeError):
            self._requests.send(request)
            socket.send_fds(self._control, [b"+"], [its_channel.fileno(), its_status.fileno()])
        if self._has_forked:
            timeout_s = min(timeout_s, FORK_S)
        status.settimeout(timeout_s)
        try:
            told, fds, _, _ = socket.recv_fds(status, _STATUS.size, 1)
        except TimeoutError:
            self._process.kill()  # it is stopped, and the next engine needs one that runs
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)  # else it might still look usable
            raise StartError(f"{name}: no process was started within {timeout_s:g} s") from None
        if not told:
            raise StartError(f"{name}: the process that starts ranks ended ({self._how()})")
        status.settimeout(None)
        self._has_forked = True
        self._stopped.clear()
        process = ForkedProcess(_STATUS.unpack(told)[0], fds[0], status, self._stopped)
        return process, Connection(channel.detach())

    def wait_for_loss(self) -> bool:
        """Wait for its end; tell whether it was one that worked, and nobody had let go of it."""
        self._process.wait()
        return self._has_forked and not self._closed

    def _how(self) -> str:
        try:
            return f"exit status {self._process.wait(GRACE_S)}"
        except subprocess.TimeoutExpired:  # its libraries take leave at length
            self._process.kill()
            return "and was killed, as it took long"

    def close(self) -> None:
        self._closed = True
        self._requests.close()
        self._control.close()


@dataclass(frozen=True, eq=False)
class _Child:
    pid: int
    pidfd: int
    status: socket.socket

    def reap(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        with suppress(OSError):  # the driver does not ask any more
            self.status.send(_STATUS.pack(os.waitstatus_to_exitcode(status)))
        self.close()

    def close(self) -> None:
        self.status.close()
        os.close(self.pidfd)


class _Server:
    def __init__(self, control: socket.socket, driver: int) -> None:
        self._control, self._driver = control, driver
        self._requests = Connection(os.dup(control.fileno()))
        self._children: dict[int, _Child] = {}  # by pidfd
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Fork on request; end with the driver, or once it has let go and no child is left."""
        for fd in (self._control.fileno(), self._driver):
            self._selector.register(fd, selectors.EVENT_READ)
        serving = True
        while serving or self._children:
            for key, _ in self._selector.select():
                if key.fd == self._driver:
                    return self._end()
                if key.fd in self._children:
                    self._selector.unregister(key.fd)
                    self._children.pop(key.fd).reap()
                elif serving := self._serve_request():
                    continue
                else:
                    self._selector.unregister(key.fd)
        return None

    def _serve_request(self) -> bool:
        try:
            request: ForkRequest = self._requests.recv()
        except (EOFError, OSError):
            return False
        _, (channel, status), _, _ = socket.recv_fds(self._control, 1, 2)
        num_threads = len(os.listdir("/proc/self/task"))
        assert num_threads == 1, f"{num_threads} threads at a fork: a lock may be held for good"
        pid = os.fork()
        if pid == 0:
            os.close(status)
            self._become(request, channel)
        os.close(channel)
        child = _Child(pid, os.pidfd_open(pid), socket.socket(fileno=status))
        self._children[child.pidfd] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ)
        with suppress(OSError):
            socket.send_fds(child.status, [_STATUS.pack(pid)], [child.pidfd])
        return True

    def _become(self, request: ForkRequest, channel: int) -> NoReturn:
        code = 1
        try:
            os.setsid()
            self._selector.close()
            self._requests.close()
            self._control.close()
            for sibling in self._children.values():
                sibling.close()
            os.environ.clear()
            os.environ.update(request.environment)
            os.chdir(request.directory)
            ctypes.CDLL(None).prctl(_PR_SET_NAME, request.name.encode())
            module, function = request.target.split(":")
            target: Target = getattr(import_module(module), function)
            target(Connection(channel), self._driver)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _end(self) -> None:
        """Let children see for themselves that the driver is gone; one that is stopped can not."""
        running = list(self._children)
        while running and (ended := wait(running, GRACE_S)):
            running = [fd for fd in running if fd not in ended]
        for fd in running:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)


def main(_token: str, control: str, driver: str, *preload: str) -> None:
    """Import `preload`, then fork; `python -m workers.forkserver TOKEN FD PIDFD MODULE...`."""
    resume_with_parent_death()
    for module in preload:
        import_module(module)
    gc.freeze()  # children share these pages as long as no collection writes to them
    _Server(socket.socket(fileno=int(control)), int(driver)).run()
    os._exit(0)  # else libraries that the server only holds for its children take leave at length


if __name__ == "__main__":
    main(*sys.argv[1:])
