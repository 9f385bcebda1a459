"""Transports of rows and records, and what each can do; `workers.communicators` connects them."""

from __future__ import annotations

from dataclasses import dataclass


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
