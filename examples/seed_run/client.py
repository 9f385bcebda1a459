"""The client: OpenAI's own, with so many chats in flight; no request is sent a second time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TypeVar

import openai

from dp_runtime.metrics.progress_bar import ProgressBar
from examples.seed_run.workload import Chat

LOOK_S = 0.02
Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """What came of one chat."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    finish_reason: str = ""
    seconds: float = 0.0
    error: str = ""


class Client:
    """Asks the chats of an exam, and counts while they are answered."""

    def __init__(self, url: str, in_flight: int, timeout_s: float) -> None:
        self._openai = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=timeout_s
        )
        self._places = asyncio.Semaphore(in_flight)
        self.num_answered = self.num_in_flight = self.most_in_flight = 0

    async def ask_all(self, chats: Sequence[Chat], title: str) -> tuple[Answer, ...]:
        async with self._openai:
            model = (await self._openai.models.list()).data[0].id
            with ProgressBar(title, len(chats), "answer") as progress:
                asking = (self._ask(model, chat, progress) for chat in chats)
                return tuple(await asyncio.gather(*asking))

    async def when_answered(self, count: int, act: Callable[[], Result]) -> Result:
        """Act in a thread as soon as so many are answered, while others are asked."""
        while self.num_answered < count:
            await asyncio.sleep(LOOK_S)
        return await asyncio.to_thread(act)

    async def _ask(self, model: str, chat: Chat, progress: ProgressBar) -> Answer:
        async with self._places:
            self.num_in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
            answer = await self._answer(model, chat)
            self.num_in_flight -= 1
            self.num_answered += 1
            progress.update(self.num_answered)
            return answer

    async def _answer(self, model: str, chat: Chat) -> Answer:
        start = monotonic()
        try:
            got = await self._openai.chat.completions.create(model=model, **chat.body)
        except openai.OpenAIError as error:
            why = f"{type(error).__name__}: {error} {error.__cause__ or ''!r}".rstrip(" '")
            return Answer(error=why, seconds=monotonic() - start)
        choice, usage = got.choices[0], got.usage
        assert usage is not None, "a whole answer has it"
        token_ids = tuple((choice.model_extra or {})["token_ids"])
        return Answer(
            choice.message.content or "", token_ids, usage.prompt_tokens, choice.finish_reason,
            monotonic() - start,
        )  # fmt: skip
