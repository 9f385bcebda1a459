"""Ranks of one host find each other in a private directory that is gone once all attached."""

from __future__ import annotations

import os
import shutil
import stat
import time
from contextlib import suppress

from collectives.shared_memory.doorbell import Doorbell
from collectives.shared_memory.region import Region, RegionLayout
from dp_runtime.core.membership import Membership
from dp_runtime.errors import StartError, require

CHANNELS = ("rows", "board")
_LOOK_EVERY_S = 0.005
LISTEN_S = 0.05  # before it is looked if the others may still come
LATE_S = 4.0  # for a ring after the names are gone: the first that met all has removed them
ATTACHED = 1  # the first turn of every channel says that the rank has attached


def remove_rendezvous(path: str) -> None:
    """Remove what is left of a rendezvous of this host; who still waits there gives up."""
    shutil.rmtree(path, ignore_errors=True)


class MeetingDirectory:
    """One rank's attempt to meet the others in a directory (0700) of FIFOs and the region (0600).

    Names are removed once all ranks have opened everything: nothing is left however ranks end.
    Whoever removes the directory before ends the attempt of all.
    """

    def __init__(
        self,
        path: str,
        dp_rank: int,
        layout: RegionLayout,
        timeout_s: float,
        members: Membership,
    ) -> None:
        self._path, self._rank, self._layout = path, dp_rank, layout
        self._members, self._name = members, members.dp_ranks[dp_rank]
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._fds: dict[str, int] = {}

    def attach(self) -> tuple[Region, dict[str, Doorbell]]:
        """Meet all ranks; raises StartError naming those that did not come in time."""
        self._enter_directory()
        try:
            self._create_own()
            while not self._open_all():
                self._wait_a_little()
            region = Region.attach(self._file("region"), self._layout, self._rank)
            bells = {channel: self._doorbell(channel) for channel in CHANNELS}
            for bell in bells.values():
                self._meet(bell)
        except BaseException:
            for fd in self._fds.values():
                os.close(fd)
            raise
        finally:
            self._remove_names()
        return region, bells

    def _enter_directory(self) -> None:
        with suppress(FileExistsError):
            os.mkdir(self._path, 0o700)
        info = os.lstat(self._path)
        private = info.st_uid == os.geteuid() and stat.S_IMODE(info.st_mode) == 0o700
        require(
            private and stat.S_ISDIR(info.st_mode), "path", self._path,
            "a directory of this user with mode 0700, or a new one",
        )  # fmt: skip
        taken = os.path.exists(self._fifo(CHANNELS[0], self._rank))
        require(not taken, "path", self._path, f"rank {self._rank} is there already: use a new one")

    def _create_own(self) -> None:
        if self._rank == 0:
            self._check_free_space()
            Region.create(self._file("region"), self._layout)
        for channel in CHANNELS:
            os.mkfifo(self._fifo(channel, self._rank), 0o600)

    def _check_free_space(self) -> None:
        space = os.statvfs(self._path)
        free, needed = space.f_bavail * space.f_frsize, self._layout.total_bytes
        if free < needed:
            raise StartError(
                f"{self._path} has {free} bytes free, {self._layout.dp_size} ranks need {needed}: "
                "use a larger /dev/shm (docker --shm-size) or smaller areas"
            )

    def _open_all(self) -> bool:
        for rank in range(self._layout.dp_size):
            for channel in CHANNELS:
                name = self._fifo(channel, rank)
                if name not in self._fds:
                    with suppress(FileNotFoundError):
                        self._fds[name] = os.open(name, os.O_RDWR | os.O_NONBLOCK)
        return not self._unseen() and os.path.exists(self._file("region"))

    def _unseen(self) -> list[int]:
        ranks = range(self._layout.dp_size)
        return [r for r in ranks if any(self._fifo(c, r) not in self._fds for c in CHANNELS)]

    def _wait_a_little(self) -> None:
        if self._is_over():
            self._give_up(self._unseen() or [0])
        time.sleep(_LOOK_EVERY_S)

    def _meet(self, bell: Doorbell) -> None:
        bell.ring(ATTACHED)
        over_at = self._deadline
        while missing := bell.missing(ATTACHED):
            if time.monotonic() > over_at:
                self._give_up(missing)
            if not os.path.isdir(self._path):
                over_at = min(over_at, time.monotonic() + LATE_S)
            bell.listen(LISTEN_S)

    def _is_over(self) -> bool:
        return time.monotonic() > self._deadline or not os.path.isdir(self._path)

    def _give_up(self, missing: list[int]) -> None:
        names = self._members.named(missing)
        if time.monotonic() <= self._deadline:
            raise StartError(f"rank {self._name} met no ranks {names}: {self._path} was removed")
        raise StartError(
            f"rank {self._name} waited {self._timeout_s:g} s at {self._path} for ranks {names}"
        )

    def _remove_names(self) -> None:
        ranks = range(self._layout.dp_size)
        names = [self._fifo(channel, rank) for channel in CHANNELS for rank in ranks]
        for name in (*names, self._file("region"), self._file("region.new")):
            with suppress(FileNotFoundError):
                os.unlink(name)
        with suppress(OSError):  # a peer was faster, or the caller keeps files of its own here
            os.rmdir(self._path)

    def _doorbell(self, channel: str) -> Doorbell:
        fds = [self._fds[self._fifo(channel, rank)] for rank in range(self._layout.dp_size)]
        return Doorbell(fds, self._rank)

    def _fifo(self, channel: str, dp_rank: int) -> str:
        return self._file(f"{channel}.{dp_rank}")

    def _file(self, name: str) -> str:
        return os.path.join(self._path, name)
