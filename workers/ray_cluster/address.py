"""ClusterAddress: finds the cluster a config names, and asks it; ray.init waits for minutes."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from dp_runtime.config import EngineConfig
from dp_runtime.errors import StartError, require
from workers.deadline import within

PROBE_S = 10.0  # for each of: the name, the connection, the first answer
_PLACE = re.compile(
    r"(ray://)?(\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+\]|[\w.-]{1,253}):(\d{1,5})", re.ASCII
)
# Calls that every server of Ray knows.
_GCS_CALL = "/ray.rpc.NodeInfoGcsService/GetClusterId"
_CLIENT_CALL = "/ray.rpc.RayletDriver/ClusterInfo"
_REASONS = {  # by gRPC's status; any other comes from Ray
    "DEADLINE_EXCEEDED": "no answer in time",
    "UNAVAILABLE": "what listens there is no Ray server",
    "UNIMPLEMENTED": "what listens there is no Ray server",
    "UNAUTHENTICATED": "it wants another token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
    "RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token to the cluster's",
}


@dataclass(frozen=True)
class ClusterAddress:
    """Where a cluster is, as ray.init takes it; "local" starts one on this host."""

    text: str
    host: str = ""  # empty for local and auto
    port: int = 0

    @classmethod
    def from_config(cls, config: EngineConfig, environment: Mapping[str, str]) -> ClusterAddress:
        """Read ray_address, else RAY_ADDRESS, as ray.init does; ValueError if it is no address."""
        named, inherited = config.ray_address, environment.get("RAY_ADDRESS")
        text = inherited if inherited and named in (None, "auto") else named
        if text is None:
            return cls("local")
        if text in ("local", "auto"):
            return cls(text)
        source = "" if text == named else " (it is that of RAY_ADDRESS)"
        return cls._parse(text, source)

    @classmethod
    def _parse(cls, text: str, source: str = "") -> ClusterAddress:
        place = _PLACE.fullmatch(text)
        port = int(place[3]) if place else 0
        ok, allowed = 1 <= port <= 65535, "auto, host:port or ray://host:port"
        require(ok, "ray_address", text, allowed + source)
        assert place is not None, "a port comes from a match"
        return cls(text, place[2].strip("[]"), port)

    @property
    def is_client(self) -> bool:
        return self.text.startswith("ray://")

    def found(self) -> ClusterAddress:
        """Return where auto leads: to the cluster of this host that was started last."""
        if self.text != "auto":
            return self
        from ray._private.services import canonicalize_bootstrap_address

        place = canonicalize_bootstrap_address("auto")
        if place is None or place == "auto":
            raise self._silent("none runs on this host")
        return self._parse(place)

    def probe(self, deadline: float) -> None:
        """Raise StartError, within seconds, if no server of Ray answers here."""
        if not self.host:
            return
        try:
            self._reach(deadline).close()
        except TimeoutError:
            raise self._silent("no answer in time") from None
        except OSError as error:
            raise self._silent(error.strerror or str(error)) from None
        self._greet(deadline)

    def _reach(self, deadline: float) -> socket.socket:
        try:
            found = within(min(deadline, monotonic() + PROBE_S), "look up", self._resolve)
        except StartError:
            raise self._silent("the look-up of its name had no answer in time") from None
        error: OSError = OSError("its name has no address")
        for _, _, _, _, place in found:
            left = min(PROBE_S, max(deadline - monotonic(), 0.01))
            try:
                return socket.create_connection(place[:2], left)
            except OSError as failed:
                error = failed
        raise error

    def _resolve(self) -> list[Any]:
        return socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)

    def _greet(self, deadline: float) -> None:
        """Raise StartError if what listens is no server of Ray, or does not take our token."""
        import grpc
        from ray._private.grpc_utils import init_grpc_channel

        place = self.text.removeprefix("ray://")
        left = min(PROBE_S, max(deadline - monotonic(), 0.01))
        with init_grpc_channel(place, [("grpc.enable_http_proxy", 0)]) as channel:
            try:
                channel.unary_unary(_CLIENT_CALL if self.is_client else _GCS_CALL)(b"", left)
            except grpc.RpcError as error:
                if reason := _REASONS.get(error.code().name):
                    raise self._silent(reason) from None

    def _silent(self, why: str) -> StartError:
        return StartError(f"ray_address: no cluster answers at {self.text!r}: {why}")
