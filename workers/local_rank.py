"""The process of one local rank, forked by a ForkServer or started as a module of its own."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from collectives.shared_memory.rendezvous import remove_rendezvous
from workers.forkserver import resume_with_parent_death
from workers.local_group import WorkerThreads
from workers.messages import Call, Join, Rendezvous, Reply
from workers.standby.worker import worker_for


def serve(connection: Connection, driver: int) -> None:
    """Answer the driver until it closes its end or, as its pidfd tells, has ended."""
    lock = threading.Lock()
    meetings: list[str] = []  # directories that the rank may be about to attach to

    def reply(call_id: int, value: object, error: BaseException | None) -> None:
        answer = Reply.with_answer(call_id, value, error)
        with lock, suppress(OSError):  # the driver is gone, and the loop below about to see it
            connection.send(answer)

    def run(call: Call) -> None:
        try:
            message = call.message
        except Exception as error:
            reply(call.call_id, None, error)
            return
        match message:
            case Join(Rendezvous(in_host_memory=True, address=directory)):
                meetings.append(directory)
        rank.call(message).add_done_callback(
            lambda done: reply(call.call_id, None if done.exception() else done.result(),
                               done.exception())
        )  # fmt: skip

    try:
        dp_rank, config, device = connection.recv()
        rank = WorkerThreads(worker_for(dp_rank, config, device))
        while driver not in wait([connection, driver]):
            run(connection.recv())
    except (EOFError, OSError):
        pass
    for directory in meetings:
        remove_rendezvous(directory)
    os._exit(0)  # NOTE: the step loop may be blocked in a collective for good


if __name__ == "__main__":
    resume_with_parent_death()
    serve(Connection(int(sys.argv[2])), int(sys.argv[3]))  # after the session token
