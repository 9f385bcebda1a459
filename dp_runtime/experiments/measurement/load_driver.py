"""Serves the conversations of a workload, each at its time, from tasks of one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic

from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.engine.async_engine import AsyncEngine
from dp_runtime.engine.async_handle import AsyncRequestHandle
from dp_runtime.errors import RankMissing, RequestFailed
from dp_runtime.experiments.measurement.request_record import RequestRecord
from dp_runtime.experiments.workload.conversations import Conversation, Segment, check_load

WARM_UP_TOKENS, WARM_UP_OUTPUTS = 16, 4


@dataclass(frozen=True, eq=False)
class LoadDriver:
    """Asks an engine; output lengths are forced, so that all engines do the same work."""

    engine: AsyncEngine
    conversations: Sequence[Conversation]
    handles: list[AsyncRequestHandle] = field(default_factory=list)  # of all that were asked

    def check(self) -> None:
        """Raise ValueError if one of them is too long for the model, or they are too many."""
        max_model_len = self.engine.model.max_model_len
        check_load(self.conversations, max_model_len, self.engine.config.max_queued_requests)

    async def warm_up(self, requests: int) -> None:
        """Serve a few on each rank, so that what is done once only is done."""
        ranks = [rank for rank in self.engine.dp_ranks for _ in range(requests)]
        model = self.engine.model
        num_outputs = min(WARM_UP_OUTPUTS, model.max_model_len - 1)
        num_tokens = min(WARM_UP_TOKENS, model.max_model_len - num_outputs)
        prompts = [Segment((number,), num_tokens) for number in range(len(ranks))]
        tokens = [prompt.token_ids(model.vocab_size) for prompt in prompts]
        handles = [
            self.engine.submit(prompt, forced(num_outputs), rank)
            for prompt, rank in zip(tokens, ranks, strict=True)
        ]
        for handle in handles:
            await handle.result()
        self.handles.extend(handles)

    async def serve(self, start_s: float) -> list[RequestRecord]:
        """Serve all of them from a time of time.monotonic() on; records are in their order."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._converse(number, each, start_s))
                    for number, each in enumerate(self.conversations)
                ]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [record for task in tasks for record in task.result()]

    async def _converse(
        self, number: int, conversation: Conversation, start_s: float
    ) -> list[RequestRecord]:
        said: list[int] = []
        records: list[RequestRecord] = []
        planned_s = conversation.at_s
        for turn in conversation.turns:
            planned_s += turn.think_s
            await asyncio.sleep(start_s + planned_s - monotonic())
            said += turn.token_ids(self.engine.model.vocab_size)
            submitted_s = monotonic() - start_s
            place = number, len(records), len(said), planned_s, submitted_s
            try:
                handle = self.engine.submit(said, forced(turn.output_len), conversation.dp_rank)
                self.handles.append(handle)
                output = await handle.result()
            except (RequestFailed, RankMissing) as error:
                records.append(record_of(place, conversation.dp_rank, (), str(error)))
                break
            arrivals = tuple((at - start_s, count) for at, count in handle.arrivals)
            records.append(record_of(place, output.dp_rank, arrivals))
            said += output.token_ids
            planned_s = records[-1].submitted_s + records[-1].e2e_s
        return records


def forced(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


Place = tuple[int, int, int, float, float]


def record_of(
    place: Place, dp_rank: int | None, arrivals: tuple[tuple[float, int], ...], error: str = ""
) -> RequestRecord:
    number, turn, prompt_tokens, planned_s, submitted_s = place
    rank = -1 if dp_rank is None else dp_rank
    return RequestRecord(number, turn, rank, prompt_tokens, planned_s, submitted_s, arrivals, error)
