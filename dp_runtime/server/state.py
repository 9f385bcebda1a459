"""ServerState: what the endpoints share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from time import time
from typing import Any, TypeVar
from uuid import uuid4

from dp_runtime.chat.sandbox import compile_template
from dp_runtime.config import EngineConfig
from dp_runtime.core.request import ImagePrompt, RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.engine.async_engine import AsyncEngine
from dp_runtime.engine.inputs import NewRequest
from dp_runtime.engine.prompts.context_length import check_room
from dp_runtime.errors import require, shown
from dp_runtime.flight.dump_file import to_lines
from dp_runtime.metrics.health_report import HealthReport
from dp_runtime.metrics.prometheus.page import metrics_page
from dp_runtime.server.answers import Client, Content, as_json
from dp_runtime.server.chat.chats import Chats
from dp_runtime.server.chat.images import has_images
from dp_runtime.server.config import ServerConfig
from dp_runtime.server.errors import ApiError
from dp_runtime.server.jobs import Job, Jobs
from dp_runtime.server.protocol.fields import GenerationBody, TextOrTokens
from dp_runtime.text.tokenizer import Tokenizer
from dp_runtime.weights.files import read_text

STARTING = "the model is loading"
HEALTH_S = 0.8  # for ranks to answer: Kubernetes' probes wait for a second unless told otherwise
SMALL_WORK = 2048  # characters to tokenize or tokens to check; more would hold up the event loop
Result = TypeVar("Result")


class ServerState:
    """The engine, once it has started, the running jobs, and whether new ones are taken."""

    def __init__(self, config: ServerConfig, engine_config: EngineConfig) -> None:
        self.config = config
        directory = Path(engine_config.model).absolute().name
        self.model_name = config.served_model_name or directory
        self.created = int(time())
        self.jobs = Jobs()
        self.draining = False
        self.sampling_defaults: Mapping[str, Any] = {}  # of fields that a request leaves out
        self._engine: AsyncEngine | None = None
        self._threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="requests")
        self._image_threads = ThreadPoolExecutor(4, thread_name_prefix="requests-images")
        # Each waits for the grammars of others.
        self._form_threads = ThreadPoolExecutor(4, thread_name_prefix="requests-forms")
        self._chats: Chats | None = None
        self._chat_template = _given_template(config.chat_template)

    @property
    def starting(self) -> bool:
        return self._engine is None

    def serve(self, engine: AsyncEngine) -> None:
        """Take the engine; ValueError for what can't be served of its checkpoint."""
        if self.config.generation_config == "auto":
            self.sampling_defaults = _checked_defaults(engine.model.sampling_defaults)
        if engine.tokenizer is not None:
            given = self._chat_template
            self._chats = Chats.of(engine.model, given, engine.tokenizer, self.config)
        self._engine = engine

    def let_go(self) -> None:
        """Forget the engine, whose memory FastAPI's caches of endpoints would keep."""
        self._engine = None

    @property
    def engine(self) -> AsyncEngine:
        """The engine; ApiError 503 until it has started, and while the server drains."""
        if self._engine is None or self.draining:
            why = "the server is stopping" if self.draining else STARTING
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, why)
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer | None:
        return None if self._engine is None else self._engine.tokenizer

    @property
    def needed_tokenizer(self) -> Tokenizer:
        return self.chats.tokenizer

    @property
    def chats(self) -> Chats:
        """How the model is talked to; ApiError where it has no tokenizer."""
        if self.engine.tokenizer is None or self._chats is None:
            raise ApiError(400, "the model's directory has no tokenizer.json: use token ids")
        return self._chats

    async def health(self) -> dict[str, Any]:
        """Tell how the server is, and each rank."""
        if self._engine is None:
            return {"status": "starting", "ranks": [], "standbys": 0}
        ranks = await self._engine.health(HEALTH_S)
        report = HealthReport.of(ranks)
        status = "ok" if report.can_serve else "failed" if self._engine.has_failed else "paused"
        status = "draining" if self.draining else status
        num_standbys = self._engine.num_standbys
        return {"status": status, "ranks": report.ranks, "standbys": num_standbys}

    async def metrics(self) -> bytes:
        """What Prometheus reads."""
        if self._engine is None:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, STARTING)
        ranks, num_standbys = await self._engine.metrics(), self._engine.num_standbys
        return await asyncio.to_thread(metrics_page, ranks, self.model_name, num_standbys)

    async def flight_record(self) -> bytes:
        """What every rank did last, as a file that `doctor` reads; also while ranks hang."""
        if self._engine is None:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, STARTING)
        dump = await self._engine.flight_record()
        return await self.in_thread(lambda: "".join(to_lines(dump)).encode())

    async def recording(self) -> bytes:
        """The steps that the ranks remember, as a file that `replay` reads."""
        recording = await self.engine.recording()
        return await self.in_thread(recording.to_bytes)

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.model_name):
            message = f"model: {shown(name)} does not exist; this server has {self.model_name!r}"
            raise ApiError(HTTPStatus.NOT_FOUND, message, "model", "model_not_found")

    def check_place(self) -> None:
        """Raise EngineOverloaded, or 503, for a request that will find no place in the engine."""
        self.engine.check_place()

    async def start(
        self,
        body: GenerationBody,
        prefix: str,
        prompts: Sequence[TextOrTokens | ImagePrompt],
        form: StructuredOutputs | None,
    ) -> Job:
        """Start body.n choices of every prompt, all of this form, or none of them."""
        job_id = f"{prefix}-{body.request_id or uuid4().hex}"
        self.jobs.check_id(job_id)
        make = partial(self._requests, prompts, body, form)
        try:
            if form is None:
                size = body.n * (sum(map(_length, prompts)) + body.num_listed)
                requests = await self.off_loop(make, size)
            else:
                loop = asyncio.get_running_loop()
                requests = await loop.run_in_executor(self._form_threads, make)
        except ValueError as error:
            raise body.as_given(error) from None
        self.jobs.check_id(job_id)  # again: another may have taken it meanwhile
        job = Job(job_id, self.engine.submit_all(requests), len(prompts))
        self.jobs.add(job)
        return job

    def client_of(self, job: Job) -> Client:
        return Client(lambda: self.jobs.end(job))

    async def off_loop(self, work: Callable[[], Result], size: int) -> Result:
        """Do work on so many characters or tokens; much of it in a thread, few at a time."""
        return work() if size <= SMALL_WORK else await self.in_thread(work)

    async def render(
        self, work: Callable[[], Result], messages: Sequence[Mapping[str, Any]]
    ) -> Result:
        """Make a prompt of a chat; those with images wait for each other, and nobody for them."""
        pool = self._image_threads if has_images(messages) else self._threads
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def encoded(self, make: Callable[[], Content], num_entries: int) -> bytes:
        """Make a part of an answer that tells of so many tokens and probabilities; encode it."""
        return await self.off_loop(lambda: as_json(make(), num_entries), num_entries)

    def _requests(
        self,
        prompts: Sequence[TextOrTokens | ImagePrompt],
        body: GenerationBody,
        form: StructuredOutputs | None,
    ) -> list[NewRequest]:
        """Check prompts, whose text is read once, and make the requests of their choices."""
        left_out = {n: v for n, v in self.sampling_defaults.items() if getattr(body, n) is None}
        params = replace(body.params, structured_outputs=form, **left_out)
        num_logprobs = 0 if params.prompt_logprobs is None else 1 + params.prompt_logprobs
        limit = self.config.max_prompt_tokens
        requests: list[NewRequest] = []
        num_tokens = 0
        for prompt in prompts:
            if isinstance(prompt, str) and body.add_special_tokens is False:
                prompt = self.needed_tokenizer.encode(prompt, add_special_tokens=False)
            for params_of_choice in _of_choices(params, body.n):
                requests.append(self.engine.checked(prompt, params_of_choice, body.dp_rank))
                tokens = requests[-1].request.prompt_token_ids
                self._check_image_tokens(requests[-1].request)
                if not isinstance(prompt, ImagePrompt):
                    prompt = tokens  # which needs not be read again
                num_tokens += len(tokens) * (1 + num_logprobs) + body.num_listed
                require(
                    num_tokens <= limit, "n", body.n,
                    f"prompts have {limit} tokens at most, n times each and with "
                    "prompt_logprobs so many times more (max_prompt_tokens)",
                )  # fmt: skip
            check_room(requests[-1].request, self.engine.model.max_model_len)
        return requests

    def _check_image_tokens(self, request: RankRequest) -> None:
        wanted = self.engine.model.images
        if wanted is None or request.images:
            return
        count = request.prompt_token_ids.count(wanted.image_token_id)
        allowed = "none where there is no image: /v1/chat/completions takes them"
        require(count == 0, "prompt", f"{count} tokens of images", allowed)


def _length(prompt: TextOrTokens | ImagePrompt) -> int:
    return len(prompt.text if isinstance(prompt, ImagePrompt) else prompt)


def _checked_defaults(given: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        SamplingParams.from_fields(given)
    except ValueError as error:
        raise ValueError(f"generation_config.json: {error}") from None
    return given


def _given_template(path: str | None) -> str | None:
    """Read the template of --chat-template, which must compile, before the engine starts."""
    if path is None:
        return None
    source = read_text(Path(path))
    compile_template(source, "chat_template")
    return source


def _of_choices(params: SamplingParams, count: int) -> list[SamplingParams]:
    """Choices of a seeded request differ, and are reproducible."""
    if params.seed is None:
        return [params] * count
    return [replace(params, seed=(params.seed + index) % 2**63) for index in range(count)]
