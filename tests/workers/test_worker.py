"""The plain worker, called as a class: no process, no actor, no engine."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from collectives.in_process import InProcessGroup
from collectives.shared_memory.group import new_rendezvous_path
from dp_runtime import EngineConfig, FinishReason, SamplingParams
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.errors import StartError
from dp_runtime.kernels.jit_build import JitModule
from dp_runtime.metrics.status import RankState
from tests.checkpoints import oracle, tiny_checkpoint
from tests.workers.engines import ENDLESS
from tests.workers.leftovers import wait_until
from workers.messages import AnyRendezvous, InProcessRendezvous, Rendezvous
from workers.worker import Worker

LONG = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True)

JIT_MODULES = "dp_runtime.attention.torch_ref.TorchRefBackend.jit_modules"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["in_process", "shared_memory"])
def worker(request: pytest.FixtureRequest, directory: Path) -> Iterator[Worker]:
    worker = new_worker(directory)
    point: AnyRendezvous = InProcessRendezvous(InProcessGroup(1, 10.0))
    if request.param == "shared_memory":
        point = Rendezvous("shared_memory", new_rendezvous_path())
    worker.prepare()
    worker.load()
    worker.join(point)
    yield worker
    worker.stop()


def new_worker(directory: Path, **fields: Any) -> Worker:
    fields = dict[str, Any](launcher="thread", max_num_requests=4) | fields
    return Worker(0, EngineConfig(str(directory), **fields), "cpu")


def request_of(request_id: int, prompt: list[int], params: SamplingParams = LONG) -> RankRequest:
    return RankRequest(request_id, tuple(prompt), params, seed=0, stop_token_ids=frozenset())


def poll_until_done(worker: Worker, request_id: int) -> list[RequestUpdate]:
    """All that the worker tells of a request, up to its end."""
    told: list[RequestUpdate] = []
    while not (told and told[-1].finish_reason):
        polled = worker.poll(5.0)
        assert polled.error is None
        assert polled.progress, "nothing within 5 s"
        told += [item for item in polled.progress if item.request_id == request_id]
    return told


def test_from_start_to_stop(directory: Path) -> None:
    worker = new_worker(directory)
    assert worker.health().state is RankState.STARTING
    assert worker.trace() == ()
    host = worker.prepare()
    assert host.dp_rank == 0
    assert host.host == socket.gethostname()
    assert worker.health().bytes_total > 0
    info = worker.load()
    health = worker.health()
    assert health.state is RankState.READY
    assert health.bytes_read == health.bytes_total == info.bytes_read
    assert (info.vocab_size, info.hidden_size, info.eos_token_ids) == (199, 64, (0,))
    worker.join(InProcessRendezvous(InProcessGroup(1, 10.0)))
    wait_until(lambda: worker.health().state is RankState.IDLE, "idle")
    assert worker.health().pid == os.getpid()
    assert worker.poll(0.0).progress == []
    worker.stop()
    assert worker.health().state is RankState.STOPPED
    worker.stop()


def test_a_poll_ends_with_its_worker(directory: Path) -> None:
    """It waits for mail of after the stop, as at the close of an engine."""
    worker = new_worker(directory)
    worker.prepare()
    worker.load()
    worker.join(InProcessRendezvous(InProcessGroup(1, 10.0)))
    worker.stop()
    poll = threading.Thread(target=worker.poll, args=(600.0,), daemon=True)
    poll.start()
    poll.join(0.05)
    assert poll.is_alive()
    worker.release()
    poll.join(30.0)
    assert not poll.is_alive()


def test_tokens_are_those_of_the_oracle(worker: Worker, directory: Path) -> None:
    prompt = [5, 17, 100, 3, 42]
    worker.submit([request_of(7, prompt, SamplingParams(max_tokens=12, temperature=0.0))])
    told = poll_until_done(worker, 7)
    tokens = [token for item in told for token in item.token_ids]
    assert [item.first_index for item in told] == list(range(12))
    assert told[-1].finish_reason is FinishReason.LENGTH
    with torch.inference_mode():
        expected = oracle(directory).generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    assert tokens == expected[0, len(prompt) :].tolist()
    steps = worker.trace()
    assert [step.passes[0].real_rows for step in steps] == [(5,)] + [(1,)] * 11
    assert worker.totals().output_tokens == 12
    assert worker.health().last_step >= 11


def test_a_rank_that_left_joins_again_without_loading(worker: Worker) -> None:
    """Two epochs of one rank give the same tokens; each step's record has its epoch."""
    loaded = worker.health()
    tokens: list[list[int]] = []
    for epoch in (0, 7):
        if epoch:
            rendezvous = worker.open_rendezvous("shared_memory", one_host=True)
            worker.join(rendezvous, epoch)
        request = request_of(1, [5, 17, 100], SamplingParams(max_tokens=8, temperature=0.0))
        worker.submit([request])
        told = poll_until_done(worker, 1)
        tokens.append([token for item in told for token in item.token_ids])
        assert [step.epoch for step in worker.trace()] == [epoch] * 8
        assert worker.health().epoch == epoch
        wait_until(lambda: worker.health().state is RankState.IDLE, "idle")
        worker.leave()
        health = worker.health()
        assert (health.state, health.last_step) == (RankState.READY, -1)
        assert (health.bytes_read, health.load_s) == (loaded.bytes_read, loaded.load_s)
        assert worker.trace() == ()
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 8
    worker.leave()  # once more changes nothing


def test_a_rank_that_could_not_join_joins_elsewhere(directory: Path, tmp_path: Path) -> None:
    worker = new_worker(directory, start_timeout_s=0.3, dp_size=2)
    worker.prepare()
    worker.load()
    with pytest.raises(StartError, match="for ranks 1"):
        worker.join(Rendezvous("shared_memory", str(tmp_path / "meet")), 1, timeout_s=0.3)
    assert worker.health().state is RankState.READY
    group = InProcessGroup(2, 5.0)
    worker.join(InProcessRendezvous(group), 2)
    assert worker.health().epoch == 2
    worker.abandon("the test is over")
    wait_until(lambda: worker.health().state is RankState.FAILED, "failed")
    worker.stop()


def test_an_unknown_message_is_refused(directory: Path) -> None:
    with pytest.raises(AssertionError, match="no message to a rank: 'prepare'"):
        new_worker(directory).answer("prepare")  # type: ignore[arg-type]


def test_abort_ends_a_request_and_no_other(worker: Worker) -> None:
    worker.submit([request_of(1, [1, 2]), request_of(2, [3], SamplingParams(max_tokens=40))])
    assert worker.poll(5.0).progress
    worker.abort([1, 999])
    assert poll_until_done(worker, 1)[-1].finish_reason is FinishReason.ABORT
    wait_until(lambda: worker.totals().output_tokens >= 40, "the other one ends")
    wait_until(lambda: worker.health().state is RankState.IDLE, "idle")
    assert worker.health().free_pages == worker.health().num_pages - 1
    worker.abort([1])


def test_stop_in_the_middle_of_a_request(worker: Worker) -> None:
    worker.submit([request_of(1, [1, 2], ENDLESS)])
    assert worker.poll(5.0).progress
    worker.stop()
    assert worker.health().state is RankState.STOPPED


def test_an_abandoned_step_is_told_at_the_next_poll(worker: Worker) -> None:
    worker.submit([request_of(1, [1, 2])])
    assert worker.poll(5.0).progress
    worker.abandon("rank 2 was gone", epoch=4)  # comes late: this is another one
    worker.abandon("rank 3 is gone")
    wait_until(lambda: worker.health().state is RankState.FAILED, "failed")
    assert worker.poll(5.0).error == "aborted by rank 0: rank 3 is gone"
    assert worker.poll(5.0).error == "aborted by rank 0: rank 3 is gone"
    assert worker.health().error == "aborted by rank 0: rank 3 is gone"


def test_a_rank_between_two_epochs_tells_of_its_steps(worker: Worker) -> None:
    worker.submit([request_of(1, [1, 2])])
    assert worker.poll(5.0).progress
    worker.suspend("rank 3 is gone")
    steps, totals = worker.trace(), worker.totals()
    assert (len(steps), totals.output_tokens) == (totals.steps, totals.steps)
    assert steps


def test_an_error_in_a_step_is_told_with_its_rank(worker: Worker) -> None:
    worker.submit([request_of(1, [1, 2]), request_of(1, [3, 4])])  # one id twice: our own mistake
    wait_until(lambda: worker.health().state is RankState.FAILED, "failed")
    assert str(worker.poll(0.0).error).startswith("rank 0: AssertionError: ")


def test_calls_in_a_wrong_order(directory: Path) -> None:
    with pytest.raises(AssertionError, match="prepare comes before load"):
        new_worker(directory).load()
    worker = new_worker(directory)
    worker.prepare()
    with pytest.raises(AssertionError, match="load comes before join"):
        worker.join(InProcessRendezvous(InProcessGroup(1, 1.0)))
    worker.stop()  # never served: there is nothing to wait for


def test_kernels_are_built_beside_loading_and_shown(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, may_finish = new_worker(directory), threading.Event()
    built = (JitModule("quick", lambda: None), JitModule("slow", lambda: may_finish.wait(10.0)))
    monkeypatch.setattr(JIT_MODULES, lambda *where: built)
    worker.prepare()
    loading = threading.Thread(target=worker.load)
    loading.start()
    wait_until(lambda: worker.health().state is RankState.COMPILING, "weights are there")
    wait_until(lambda: worker.health().kernels_built == 1, "one kernel is built")
    health = worker.health()
    assert (health.kernels_total, health.bytes_loaded) == (2, health.bytes_total)
    may_finish.set()
    loading.join()
    assert worker.health().state is RankState.READY
    assert worker.health().kernels_built == 2


def test_a_kernel_that_can_not_be_built_is_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("no nvcc")

    monkeypatch.setattr(
        "dp_runtime.attention.torch_ref.TorchRefBackend.jit_modules",
        lambda *where: (JitModule("XQA q_len 1", fail),),
    )
    worker = new_worker(directory)
    worker.prepare()
    with pytest.raises(RuntimeError, match="kernel XQA q_len 1: no nvcc"):
        worker.load()
