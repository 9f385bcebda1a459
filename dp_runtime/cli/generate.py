"""`generate`: continue prompts, print or write the results, and print the report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from dp_runtime.cli.flags import add_flags, given_fields, new_file, utf8_text
from dp_runtime.cli.jsonl import PromptLine, output_line, read_prompts
from dp_runtime.cli.model_choice import config_from
from dp_runtime.cli.output import OutputFile, WriteFailed, check_not_read, print_line
from dp_runtime.cli.reports import rank_memory
from dp_runtime.cli.trace_file import TraceFile, add_trace_flag
from dp_runtime.core.request import ImagePrompt, Prompt, RequestOutput
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.engine.engine import Engine
from dp_runtime.errors import require

DEFAULTS: dict[str, object] = {"max_tokens": 48, "temperature": 0.0}
DEMO_PROMPTS = (
    "The list of arguments",
    "If the file does not exist,",
    "Return a new string",
    "This module provides",
    "A class can be used to",
    "The default value is",
)
SAMPLING_FLAGS = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "stop", "stop_token_ids", "bad_words",
    "allowed_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens",
    "truncate_prompt_tokens", "priority", "timeout_s", "cache_salt",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", action="append", type=utf8_text, help="a prompt; may be repeated"
    )
    parser.add_argument(
        "--image", action="append", type=Path, help="an image file, for each --prompt; may be "
        "repeated. A prompt without the model's image tokens gets them in front"
    )  # fmt: skip
    parser.add_argument("--prompts", type=Path, help="JSONL file of prompts, or /dev/stdin")
    parser.add_argument("--output", type=new_file, help="JSONL file for the results")
    add_trace_flag(parser)
    add_flags(parser, SamplingParams, SAMPLING_FLAGS, DEFAULTS)


def generate(options: argparse.Namespace) -> None:
    """Continue prompts, print or write the results, and print the report."""
    lines = _prompts(options)
    config = config_from(options)
    with ExitStack() as stack:
        file = stack.enter_context(OutputFile("output", options.output)) if options.output else None
        trace = TraceFile.opened(stack, options.trace)
        engine = stack.enter_context(Engine(config, show_progress=True))
        shows_text = engine.tokenizer is not None
        results = Results(lines, file.write if file else print_line, file is not None, shows_text)
        engine.generate(
            [_with_images(line.prompt, options.image or (), engine) for line in lines],
            [line.params for line in lines],
            [line.dp_rank for line in lines],
            show_progress=True,
            on_output=results.take,
        )
        report, steps, health = engine.report(), engine.step_trace(), engine.health()
        trace.write(steps, health)
    print_line(str(report))
    print_line(rank_memory(health))


@dataclass
class Results:
    """Passes results on as they come, as JSON lines or as text for a reader."""

    lines: list[PromptLine]
    write: Callable[[str], None]
    as_json: bool
    shows_text: bool
    num_written: int = field(default=0, init=False)

    def take(self, index: int, output: RequestOutput) -> None:
        try:
            self.write(output_line(index, output) if self.as_json else self._text(index, output))
        except WriteFailed as error:
            counted = f"{self.num_written} of {len(self.lines)} results were written"
            raise WriteFailed(f"{error}; {counted}") from error
        self.num_written += 1

    def _text(self, index: int, output: RequestOutput) -> str:
        text = output.text if self.shows_text else f" {list(output.token_ids)}"
        head = f"[rank {output.dp_rank}, {output.finish_reason}]"
        return f"{head} {self.lines[index].prompt} →{text}\n"


def _with_images(prompt: Prompt, images: Sequence[Path], engine: Engine) -> Prompt:
    """Give a prompt the images of the command line, in front of its text if it has no place."""
    if not (images and isinstance(prompt, str)):
        return prompt
    wants, tokenizer = engine.model.images, engine.tokenizer
    if wants is None or tokenizer is None:
        return ImagePrompt(prompt, images)  # which the engine refuses, and says why
    one, place = (
        tokenizer.decode(tokens, skip_special_tokens=False)
        for tokens in (wants.image_token_ids[1:2], wants.image_token_ids)
    )
    return ImagePrompt(prompt if one in prompt else place * len(images) + prompt, images)


def _prompts(options: argparse.Namespace) -> list[PromptLine]:
    sampling = DEFAULTS | given_fields(options, SamplingParams)
    sampling.pop("seed", None)  # the flag is the engine's, from which requests derive their own
    defaults = SamplingParams.from_fields(sampling)
    require(
        not options.image or bool(options.prompt), "image", str((options.image or [""])[0]),
        "none without --prompt",
    )  # fmt: skip
    if options.prompts is not None:
        require(not options.prompt, "prompt", options.prompt, "nothing beside --prompts")
        if options.output is not None:
            allowed = "a file other than the one of --prompts"
            check_not_read(options.output, [options.prompts], allowed)
        return read_prompts(options.prompts, defaults)
    return [PromptLine(text, defaults, None) for text in options.prompt or DEMO_PROMPTS]
