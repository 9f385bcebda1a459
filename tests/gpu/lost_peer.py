"""One rank of two GPUs, as a program.

    python -m tests.gpu.lost_peer RANK TRANSPORT ADDRESS HOW WHERE

Rank 0 prints a JSON object of how its wait ended and what it could do afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from collectives.torch_distributed.group import TorchDistributedGroup
from dp_runtime.parallel.agreement import StepRecord
from dp_runtime.parallel.collective import RowCollective
from tests.collectives.ranks import outcome
from workers.communicators import Communicator

TIMEOUT_S = 3.0
HIDDEN = 2048


def move(c: RowCollective, where: str) -> Tensor:
    """One collective; its result is on its way when this returns."""
    match where:
        case "gather":
            return c.all_gather(torch.ones(8, HIDDEN, device="cuda"), (8,) * c.dp_size)
        case "uneven gather":
            counts = tuple(range(1, c.dp_size + 1))
            return c.all_gather(torch.ones(counts[c.dp_rank], HIDDEN, device="cuda"), counts)
        case "reduce_scatter":
            partial = torch.ones(8 * c.dp_size, HIDDEN, device="cuda")
            return c.reduce_scatter(partial, (8,) * c.dp_size)
        case _:
            counts = tuple(range(1, c.dp_size + 1))
            partial = torch.ones(sum(counts), HIDDEN, device="cuda")
            return c.reduce_scatter(partial, counts)


def wait_for(c: RowCollective, launch: Callable[[], Tensor]) -> float:
    """What a step does: launch, wait for the device, then ask whether the result counts."""
    total = float(launch().sum().item())
    c.raise_if_failed()
    return total


def be_lost(how: str) -> None:
    match how:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case _:
            time.sleep(3 * TIMEOUT_S)  # it is late, and the survivor aborts


def connect(transport: str, address: str, rank: int, size: int) -> Communicator:
    device = torch.device("cuda", rank)
    if transport == "nccl":
        return TorchDistributedGroup(address, rank, size, TIMEOUT_S, "nccl", device)
    from collectives.peer_to_peer.group import PeerToPeerGroup  # needs triton

    return PeerToPeerGroup(address, rank, size, TIMEOUT_S, device)


def alone(transport: str, address: str) -> bool:
    """Whether this process can join a new group and compute."""
    device = torch.device("cuda:0")
    group = connect(transport, address + ".alone", 0, 1)
    rows = torch.randn(16, HIDDEN, device=device)
    right = torch.equal(group.collective.all_gather(rows, (16,)), rows)
    product = rows @ rows.t()
    right &= torch.allclose(product.cpu(), rows.cpu() @ rows.cpu().t(), atol=1.0)
    group.collective.raise_if_failed()
    group.close()
    return right


def main(rank: int, transport: str, address: str, how: str, where: str) -> None:
    torch.cuda.set_device(rank)
    group = connect(transport, address, rank, 2)
    c = group.collective
    for name in ("gather", "uneven gather", "reduce_scatter", "uneven reduce_scatter"):
        wait_for(c, partial(move, c, name))
    c.barrier()
    if how == "orderly":
        group.board.all_gather_records(StepRecord(0, 0, 0, (1,)))
        move(c, where)
        group.close()
        time.sleep(2.5 * rank)  # the owner of the store leaves first
        return
    if rank == 1:
        time.sleep(0.3)  # so that the peer has left the barrier
        be_lost(how)
        return
    if how == "aborted":
        threading.Timer(0.5, c.abort, ("for a test",)).start()
    ended = outcome(lambda: wait_for(c, lambda: move(c, where)))
    after = [outcome(call) for call in (c.raise_if_failed, c.barrier, lambda: move(c, where))]
    started = time.monotonic()
    group.close()
    closed_s = time.monotonic() - started
    after_errors = [each.error for each in after]
    told = {"ended": asdict(ended), "after": after_errors, "closed_s": closed_s}
    print(json.dumps(told | {"alone": alone(transport, address)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:6])
