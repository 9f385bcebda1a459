"""Jobs: the running requests behind each HTTP request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from time import time

from dp_runtime.core.request import FinishReason, RequestDelta, RequestOutput
from dp_runtime.engine.async_handle import AsyncRequestHandle
from dp_runtime.server.errors import LATE, ApiError, refuse

MAX_ID_LENGTH = 256


def stop_reason(handle: AsyncRequestHandle) -> str | int | None:
    """The stop string, or which of its stop_token_ids ended a request; end-of-text is no reason."""
    found = handle.output.stop_reason if handle.output else None
    asked = isinstance(found, str) or found in handle.request.params.stop_token_ids
    return found if asked else None


@dataclass(frozen=True, eq=False)
class Job:
    """The engine's requests for one HTTP request, in the order of its choices."""

    id: str
    handles: Sequence[AsyncRequestHandle]
    num_prompts: int
    created: int = field(default_factory=lambda: int(time()))

    @property
    def choices_per_prompt(self) -> int:
        return len(self.handles) // self.num_prompts

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts; the choices of one prompt share it."""
        firsts = self.handles[:: self.choices_per_prompt]
        return sum(len(handle.request.prompt_token_ids) for handle in firsts)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompts that were cached for all of their choices, as far as is known."""
        cached, count = [each.num_cached_tokens for each in self.handles], self.choices_per_prompt
        return sum(min(cached[first : first + count]) for first in range(0, len(cached), count))

    def num_entries(self, index: int, num_tokens: int, with_prompt: bool) -> int:
        """Count the entries for tokens of a choice, and for its prompt's if they are told too."""
        request = self.handles[index].request
        count = num_tokens * (1 + (request.params.logprobs or 0))
        if request.params.return_routed_experts:  # an array, which is encoded fast
            count += len(request.prompt_token_ids) + num_tokens
        if with_prompt and request.params.prompt_logprobs is not None:
            count += len(request.prompt_token_ids) * (1 + request.params.prompt_logprobs)
        return count

    async def outputs(self) -> list[RequestOutput]:
        """Return what all choices have; ApiError 408 if time was over before the first token."""
        outputs = [await handle.result() for handle in self.handles]
        late = all(each.finish_reason is FinishReason.TIMEOUT for each in outputs)
        if late and not any(each.token_ids for each in outputs):
            seconds = self.handles[0].request.params.timeout_s
            message = f"no token came within {seconds:g} s (timeout_s)"
            raise ApiError(HTTPStatus.REQUEST_TIMEOUT, message, "timeout_s", LATE)
        return outputs

    async def deltas(self) -> AsyncIterator[tuple[int, RequestDelta]]:
        """Yield the deltas of all choices as they come, each with its choice's index."""
        news, unfinished = self.handles[0].news, dict(enumerate(self.handles))
        while unfinished:
            news.clear()
            for index, handle in list(unfinished.items()):
                ended = handle.done  # before its last deltas are taken
                while (delta := handle.take_delta()) is not None:
                    yield index, delta
                if ended:
                    del unfinished[index]
            if unfinished:
                await news.wait()

    def abort(self) -> None:
        for handle in self.handles:
            handle.abort()


class Jobs:
    """All running jobs by their ids, which clients may choose."""

    def __init__(self) -> None:
        self._running: dict[str, Job] = {}

    def __len__(self) -> int:
        return len(self._running)

    def check_id(self, job_id: str) -> None:
        ok = len(job_id) <= MAX_ID_LENGTH and job_id.isprintable() and job_id not in self._running
        allowed = f"at most {MAX_ID_LENGTH} printable characters, and no running request's"
        if not ok:
            raise refuse("request_id", job_id, allowed)

    def add(self, job: Job) -> None:
        self._running[job.id] = job

    def end(self, job: Job) -> None:
        """Forget an answered job; whatever is unfinished is aborted."""
        del self._running[job.id]
        job.abort()

    def abort(self, job_ids: Sequence[str]) -> list[str]:
        """Abort these jobs; returns the ids of those that were running."""
        found = [job_id for job_id in dict.fromkeys(job_ids) if job_id in self._running]
        for job_id in found:
            self._running[job_id].abort()
        return found

    def abort_all(self) -> list[str]:
        return self.abort(list(self._running))
