"""`serve`: an OpenAI endpoint over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import os
from contextlib import ExitStack
from importlib.util import find_spec

from dp_runtime.cli.flags import add_flags, given_fields
from dp_runtime.cli.model_choice import config_from
from dp_runtime.cli.trace_file import TraceFile, add_trace_flag
from dp_runtime.engine.async_engine import AsyncEngine
from dp_runtime.models.example_models import example_models
from dp_runtime.server.config import ServerConfig

KEY_VARIABLES = {"api_key": "DP_RUNTIME_API_KEY", "admin_key": "DP_RUNTIME_ADMIN_KEY"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trace_flag(parser)
    add_flags(parser, ServerConfig)


def serve(options: argparse.Namespace) -> None:
    """Serve OpenAI's endpoints over HTTP until Ctrl-C or SIGTERM."""
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise ValueError("serve needs the extra 'serve': pip install 'dp-runtime[serve]'")
    from dp_runtime.server.run import serve as run

    # The ranks and whatever else inherits the environment are none of the keys' business.
    keys = {name: os.environ.pop(variable, None) for name, variable in KEY_VARIABLES.items()}
    model = getattr(options, "model", None)
    named = {"served_model_name": model} if model in example_models() else {}
    given = keys | named | given_fields(options, ServerConfig)
    with ExitStack() as stack:
        trace = TraceFile.opened(stack, options.trace)

        def on_drained(engine: AsyncEngine) -> None:
            if trace.file is not None:  # else no rank need be well enough to tell
                trace.write(asyncio.run(engine.step_trace()), asyncio.run(engine.health()))

        run(config_from(options), ServerConfig(**given), on_drained)
