"""Asking an engine for what a load wants, and serving it over HTTP beside that."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from dp_runtime import AsyncEngine, Engine, EngineConfig, SamplingParams
from dp_runtime.server.config import ServerConfig
from dp_runtime.server.listener import Listener
from dp_runtime.server.state import ServerState
from examples.benchmarks.harness.load import Answer, LoadRequest


@contextmanager
def serving(config: EngineConfig, show_progress: bool = False) -> Iterator[tuple[AsyncEngine, str]]:
    """Serve as `launch.py serve` does; this process may use the engine too."""
    state = ServerState(ServerConfig(port=0), config)
    listener = Listener(state)
    try:
        engine = AsyncEngine(config, show_progress)
        try:
            gc.collect()
            gc.freeze()
            state.serve(engine)
            yield engine, listener.url
        finally:
            engine.close_now()
            state.let_go()
    finally:
        listener.close(threading.Event())


def params_of(request: LoadRequest) -> SamplingParams:
    return SamplingParams(max_tokens=request.output_len, temperature=0.0, ignore_eos=True)


def ask_sync(engine: Engine, request: LoadRequest, stream: bool) -> Answer:
    answer = Answer(monotonic())
    handle = engine.submit(request.prompt, params_of(request))
    for part in handle if stream else [handle.result()]:
        answer.came(part.token_ids)
    return answer


async def ask_async(engine: AsyncEngine, request: LoadRequest, stream: bool) -> Answer:
    answer = Answer(monotonic())
    if stream:
        async for delta in engine.stream(request.prompt, params_of(request)):
            answer.came(delta.token_ids)
    else:
        (output,) = await engine.generate([request.prompt], params_of(request))
        answer.came(output.token_ids)
    return answer
