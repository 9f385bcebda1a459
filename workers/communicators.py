"""A rank's connection to the other ranks, whichever transport carries it."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from collectives.shared_memory.group import new_rendezvous_path
from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership
from dp_runtime.errors import not_allowed
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.step_board import StepBoard
from dp_runtime.parallel.transports import TRANSPORTS, Transport, choose_transport
from dp_runtime.runner.fault_injection import DueFaults, FaultyBoard
from workers.messages import AnyRendezvous, HostInfo, InProcessRendezvous, Rendezvous

LOOPBACK = "127.0.0.1"


class Communicator(Protocol):
    @property
    def collective(self) -> RowCollective: ...

    @property
    def board(self) -> StepBoard: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class InProcessCommunicator:
    collective: RowCollective
    board: StepBoard

    def close(self) -> None:
        self.collective.close()
        self.board.close()


class FaultyCommunicator:
    """A communicator in whose board faults happen."""

    def __init__(self, communicator: Communicator, due: DueFaults) -> None:
        self.collective = communicator.collective
        self.board: StepBoard = FaultyBoard(communicator.board, due)
        self.close = communicator.close


@dataclass(frozen=True, eq=False)
class OpenedRendezvous:
    """A rendezvous on the host of the rank that opened it, and what the rank listens on there."""

    rendezvous: Rendezvous
    listener: socket.socket | None = None


def open_rendezvous(transport: str, one_host: bool) -> OpenedRendezvous:
    """Make a new place to meet; only ranks of this host can reach it if all of them are here."""
    if not TRANSPORTS[transport].spans_hosts:
        return OpenedRendezvous(Rendezvous(transport, new_rendezvous_path()))
    host = LOOPBACK if one_host else cluster_address()
    listener = socket.create_server((host, 0))
    address = f"tcp://{host}:{listener.getsockname()[1]}"
    return OpenedRendezvous(Rendezvous(transport, address, secrets.token_hex(16)), listener)


def connect(
    rendezvous: AnyRendezvous,
    dp_rank: int,
    config: EngineConfig,
    device: torch.device,
    attach_timeout_s: float,
    listener: socket.socket | None = None,
    members: Membership | None = None,
) -> Communicator:
    members = members or Membership.first(config.dp_size)
    position = members.position(dp_rank)
    if isinstance(rendezvous, InProcessRendezvous):
        group = rendezvous.group
        return InProcessCommunicator(group.collective(position), group.board(position))
    place = (rendezvous.address, position, members.size, config.step_timeout_s)
    match rendezvous.transport:
        case "shared_memory":
            from collectives.shared_memory.group import SharedMemoryGroup

            return SharedMemoryGroup(*place, attach_timeout_s=attach_timeout_s, members=members)
        case "peer_to_peer":
            from collectives.peer_to_peer.group import PeerToPeerGroup

            return PeerToPeerGroup(*place, device, attach_timeout_s, members)
        case "torch_distributed":
            from collectives.torch_distributed.group import TorchDistributedGroup

            backend = "nccl" if device.type == "cuda" else "gloo"
            return TorchDistributedGroup(
                *place, backend, device, attach_timeout_s, rendezvous.secret, listener, members
            )
        case transport:
            raise AssertionError(f"no transport {transport!r}")


def cluster_address() -> str:
    """Return the address other hosts reach this one by; loopback on a host without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # NOTE: sends nothing; it only picks the interface
        except OSError:
            return LOOPBACK
        return str(probe.getsockname()[0])


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
        several = f"where ranks are on several hosts: {', '.join(names)}"
        if config.collective == "auto":  # ranks that share GPUs meet in memory
            raise not_allowed("ranks_per_gpu", config.ranks_per_gpu, f"1 {several}")
        raise not_allowed("collective", transport.name, f"auto or torch_distributed {several}")
    return transport


def where(hosts: Sequence[HostInfo], met: Rendezvous) -> tuple[str, str, str]:
    return ", ".join(sorted({host.host for host in hosts})), met.transport, met.address
