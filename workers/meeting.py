"""Where the ranks of an engine meet, by the hosts that they are on."""

from __future__ import annotations

from collections.abc import Sequence

from dp_runtime.config import EngineConfig
from dp_runtime.parallel.transports import Transport, choose_transport
from workers.messages import HostInfo, Rendezvous


def transport_of(config: EngineConfig, hosts: Sequence[HostInfo]) -> Transport:
    """Choose how ranks on these hosts meet; ValueError if the config's way needs one host."""
    names = sorted({host.host for host in hosts})
    transport = choose_transport(
        config.collective,
        config.device,
        threads=config.launcher == "thread",
        shared_gpus=config.device == "cuda" and config.ranks_per_gpu > 1,
        one_host=len(names) == 1,
    )
    if len(names) > 1 and not transport.spans_hosts:
        raise ValueError(f"collective: {transport.name!r} is not allowed; ranks are on {names}")
    return transport


def where(hosts: Sequence[HostInfo], met: Rendezvous) -> tuple[str, str, str]:
    return ", ".join(sorted({host.host for host in hosts})), met.transport, met.address
