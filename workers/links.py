"""A rank's connection to the other ranks, whichever transport carries it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from dp_runtime.config import EngineConfig
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.step_board import StepBoard
from workers.messages import MeetingPoint


class Communicator(Protocol):
    """A rank's collective and board, which live and end together."""

    @property
    def collective(self) -> RowCollective: ...

    @property
    def board(self) -> StepBoard: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class InProcessCommunicator:
    """The links of a rank that is a thread beside the others."""

    collective: RowCollective
    board: StepBoard

    def close(self) -> None:
        self.collective.close()
        self.board.close()


def connect(
    point: MeetingPoint, dp_rank: int, config: EngineConfig, device: torch.device
) -> Communicator:
    """Meet the other ranks; every later wait is bounded by the config's step timeout."""
    match point.kind:
        case "shared_memory":
            from collectives.shared_memory.group import SharedMemoryGroup

            return SharedMemoryGroup(
                point.address,
                dp_rank,
                config.dp_size,
                config.step_timeout_s,
                attach_timeout_s=config.start_timeout_s,
            )
        case "peer_to_peer":
            from collectives.peer_to_peer.group import PeerToPeerGroup

            return PeerToPeerGroup(
                point.address,
                dp_rank,
                config.dp_size,
                config.step_timeout_s,
                device,
                attach_timeout_s=config.start_timeout_s,
            )
        case "torch_distributed":
            from collectives.torch_distributed.group import TorchDistributedGroup

            backend = "nccl" if device.type == "cuda" else "gloo"
            return TorchDistributedGroup(
                point.address,
                dp_rank,
                config.dp_size,
                config.step_timeout_s,
                backend,
                device,
                attach_timeout_s=config.start_timeout_s,
            )
        case "in_process":
            return InProcessCommunicator(
                point.group.collective(dp_rank), point.group.board(dp_rank)
            )
        case kind:
            raise AssertionError(f"no transport {kind!r}")
