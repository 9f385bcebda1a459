"""Transports of rows and records, and what each can do; `workers.communicators` connects them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dp_runtime.errors import require


@dataclass(frozen=True, kw_only=True)
class Transport:
    name: str
    device_types: tuple[str, ...] = ("cpu", "cuda")
    spans_hosts: bool = False
    in_process: bool = False  # ranks are threads of one process
    shares_gpus: bool = True  # several ranks may use one GPU
    capturable: bool = False  # its collectives may be part of a CUDA graph


IN_PROCESS = Transport(name="in_process", in_process=True)
SHARED_MEMORY = Transport(name="shared_memory")
PEER_TO_PEER = Transport(name="peer_to_peer", device_types=("cuda",), capturable=True)
TORCH_DISTRIBUTED = Transport(
    name="torch_distributed", spans_hosts=True, shares_gpus=False, capturable=True
)
TRANSPORTS = {
    transport.name: transport
    for transport in (SHARED_MEMORY, PEER_TO_PEER, TORCH_DISTRIBUTED, IN_PROCESS)
}


def choose_transport(
    name: str, device_type: str, *, threads: bool, shared_gpus: bool, one_host: bool
) -> Transport:
    """Return the transport of that name; "auto" takes the fastest that these ranks can use."""
    if name != "auto":
        return TRANSPORTS[name]
    if threads:
        return IN_PROCESS
    if shared_gpus:
        return SHARED_MEMORY  # NCCL refuses two ranks on one GPU
    if not one_host:
        return TORCH_DISTRIBUTED
    return PEER_TO_PEER if device_type == "cuda" else SHARED_MEMORY


def check_transport(transport: Transport, device: str, launcher: str, ranks_per_gpu: int) -> None:
    """ValueError if it does not go with the device, the launcher or ranks that share GPUs."""
    threads, one_each = launcher == "thread", device != "cuda" or ranks_per_gpu == 1
    name, launchers = transport.name, "thread" if transport.in_process else "ray or local"
    fitting = [each for each in TRANSPORTS.values() if each.in_process == threads]
    _require_one_of(
        fitting, transport, f"with launcher {launcher}; or launcher {launchers} with {name}"
    )
    fitting = [each for each in fitting if device in ("auto", *each.device_types)]
    _require_one_of(fitting, transport, f"on device {device}; {name} is for GPUs")
    fitting = [each for each in fitting if one_each or each.shares_gpus]
    why = "NCCL refuses two ranks on one GPU"
    _require_one_of(fitting, transport, f"with ranks_per_gpu {ranks_per_gpu}; {why}")


def _require_one_of(fitting: Sequence[Transport], transport: Transport, condition: str) -> None:
    names = " or ".join(["auto", *(each.name for each in fitting)])
    require(transport in fitting, "collective", transport.name, f"{names} {condition}")
