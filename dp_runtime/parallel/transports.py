"""Transports of rows and records, and what each can do; `workers.communicators` connects them."""

from __future__ import annotations

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


def check_transport(transport: Transport, device: str, threads: bool, ranks_per_gpu: int) -> None:
    """ValueError if it does not go with the device, the launcher or ranks that share GPUs."""
    field, name = "collective", transport.name
    fits = device in ("auto", *transport.device_types)
    require(fits, field, name, f"{name} is for GPUs, not for device cpu")
    fits = transport.in_process == threads
    require(fits, field, name, "in_process goes with launcher 'thread', and with no other")
    shares = device == "cuda" and ranks_per_gpu > 1
    require(
        transport.shares_gpus or not shares, field, name,
        f"with ranks_per_gpu {ranks_per_gpu} use auto, shared_memory or peer_to_peer: NCCL "
        "refuses two ranks on one GPU",
    )  # fmt: skip
