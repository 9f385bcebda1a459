"""The health of a rank, and facts about the model that it loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dp_runtime.core.request import ImageFormat, RoutingShape
from dp_runtime.metrics.memory import RankMemory

DEFAULT_TEMPLATE, TOOL_TEMPLATE = "default", "tool_use"  # names that checkpoints use


class RankState(StrEnum):
    STARTING = "starting"
    LOADING = "loading"
    COMPILING = "compiling"  # weights are there, kernels are not all built
    READY = "ready"
    CAPTURING = "capturing"  # CUDA graphs; in all epochs but the first it steps meanwhile
    RUNNING = "running"
    IDLE = "idle"
    FAILED = "failed"
    STOPPED = "stopped"
    UNREACHABLE = "unreachable"  # its process does not answer


@dataclass(frozen=True)
class ChatFiles:
    """What a checkpoint says about chats; chats can't be served where it has no template."""

    templates: Mapping[str, str] = field(default_factory=dict)  # by name
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # bos_token: "<s>"


@dataclass(frozen=True)
class ModelInfo:
    """Facts about the model that rank 0 reads, since the driver may not see its files."""

    architecture: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    tokenizer_json: str | None  # the content of tokenizer.json
    cache_tokens: int  # tokens the page pool of one rank can hold
    bytes_read: int  # from rank 0's checkpoint slices
    chat: ChatFiles = field(default_factory=ChatFiles)
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)  # as the checkpoint has them
    routing: RoutingShape | None = None  # of the experts that requests may ask for, if they may
    caches_prefixes: bool = False  # ranks keep pages for requests that begin alike
    keeps_state: bool = False  # and can go on from one only with the recurrent state behind it
    images: ImageFormat | None = None  # None: it takes none


@dataclass(frozen=True)
class GraphUse:
    count: int
    capture_s: float  # warm-up included
    num_bytes: int  # of the device's memory, the driver's part included

    def __str__(self) -> str:
        return f"{self.count} graphs: {self.capture_s:.1f} s, {self.num_bytes / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class StateUse:
    """Slots of recurrent states, without the null slot; all 0 where no layer has one."""

    num_slots: int = 0  # of requests
    free_slots: int = 0
    num_checkpoints: int = 0  # of the prefix cache
    free_checkpoints: int = 0
    evictions: int = 0  # of states behind cached pages, as a slot was needed


@dataclass(frozen=True)
class RankHealth:
    """Progress of one rank; being alive is not progress, so the last finished step counts."""

    dp_rank: int
    state: RankState
    pid: int = 0  # 0 of a rank that does not answer, which is nobody to send signals to
    host: str = ""
    clock_offset_ns: int = 0  # the wall clock minus the performance counter of its host
    epoch: int = 0
    dp_size: int = 0  # ranks that serve together, known once the rank has a plan
    last_step: int = -1
    last_step_age_s: float = 0.0
    free_pages: int = 0
    num_pages: int = 0
    states: StateUse = StateUse()
    num_running: int = 0
    num_queued: int = 0
    bytes_read: int = 0  # from disk, known once the rank has loaded
    bytes_loaded: int = 0
    bytes_total: int = 0
    kernels_built: int = 0  # compiled and loaded
    kernels_total: int = 0
    graphs_captured: int = 0
    graphs_total: int = 0
    load_s: float = 0.0  # seconds to allocate pages and load weights
    graphs: GraphUse | None = None  # known once they are captured
    memory: RankMemory | None = None  # known once the rank has a plan
    error: str = ""


def at_rest(ranks: Sequence[RankHealth]) -> bool:
    """Tell whether all of them idle, and have finished the same steps."""
    idle = {rank.state for rank in ranks} == {RankState.IDLE}
    return idle and len({(rank.epoch, rank.last_step) for rank in ranks}) == 1
