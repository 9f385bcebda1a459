"""Calls of the API that a seed draws: right ones, wrong ones, in any order, from many threads."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from dp_runtime import AsyncEngine, Engine, SamplingParams, StructuredOutputs
from dp_runtime.core.request import TokensPrompt
from dp_runtime.errors import EngineClosed, EngineOverloaded, RequestFailed
from tests.dp_runtime.hostile import FLOAT_TWOS, INT_LISTS, MAPPINGS, junk

WAIT_S = 60.0
ALLOWED = (ValueError, EngineOverloaded, RequestFailed, EngineClosed, TimeoutError)
JUNK = [value for name, value in junk().items() if name != "mock"]
VALUES = [
    *JUNK,
    *FLOAT_TWOS,
    *INT_LISTS,
    *MAPPINGS,
    "a",
    "",
    None,
    True,
    -1,
    0,
    -0.0,
    [1],
    {},
    "\ud800",
]
USUAL: dict[str, Sequence[Any]] = {
    "max_tokens": (1, 2, 5, None), "min_tokens": (0, 1), "temperature": (0, 0.7, 1),
    "top_k": (-1, 0, 5), "top_p": (0.5, 1), "min_p": (0, 0.1), "presence_penalty": (0, 1),
    "frequency_penalty": (0, -1), "repetition_penalty": (1, 1.3), "logit_bias": ({3: 2.0}, {}),
    "seed": (None, 7), "stop": ((), "a", ["e", "\n"]), "stop_token_ids": ((), [5]),
    "include_stop_str_in_output": (True, False), "bad_words": ((), ["a"]),
    "allowed_token_ids": (None, [3, 4, 5]), "ignore_eos": (True, False),
    "structured_outputs": (None,) * 20 + ({"regex": "[a-z]{3}"}, StructuredOutputs(choice=["a"])),
    "skip_special_tokens": (True, False), "priority": (0, -3, 9),
    "timeout_s": (None, None, 30, 0.01, 1e-9), "logprobs": (None, 0, 3),
    "prompt_logprobs": (None, 1), "truncate_prompt_tokens": (None, -1, 3),
}  # fmt: skip
PROMPTS = ("a", "The list", [1, 2, 3], range(1, 30), [5] * 63, TokensPrompt([4, 5]))
RANKS = (None, None, 0, 1, 2, -1)


class Draw:
    """Draws arguments; mistakes are as likely as `wildness` says."""

    def __init__(self, seed: int, wildness: float) -> None:
        self.random = random.Random(seed)
        self._wildness = wildness

    def of(self, usual: Sequence[Any]) -> Any:
        wild = self.random.random() < self._wildness
        return self.random.choice(VALUES if wild else usual)

    def prompt(self) -> Any:
        if self.random.random() < 0.1:
            return TokensPrompt(self.of(PROMPTS[2:5]), self.of([None]), self.of([(), [0]]))
        return self.of(PROMPTS)

    def params(self) -> Any:
        """Parameters, a value that is none, or ValueError from their making."""
        if self.random.random() < self._wildness / 4:
            return self.random.choice(VALUES)
        names = self.random.sample(sorted(USUAL), self.random.randrange(5))
        given = {name: self.of(USUAL[name]) for name in names}
        make = SamplingParams.from_fields if self.random.random() < 0.3 else _made
        return make({"max_tokens": 2} | given)

    def several(self, one: Callable[[], Any]) -> Any:
        return [one() for _ in range(self.random.randrange(4))] if self._tame() else one()

    def submission(self) -> tuple[Any, Any, Any]:
        return self.prompt(), self.params(), self.of(RANKS)

    def batch(self) -> tuple[Any, Any, Any]:
        ranks = self.several(lambda: self.of(RANKS)) if self._tame() else None
        return self.several(self.prompt), self.several(self.params), ranks

    def timeout(self) -> Any:
        return self.of((0, 0.001, WAIT_S))

    def _tame(self) -> bool:
        return self.random.random() < 0.8


def _made(given: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**given)


def _ignore(*_: object) -> None: ...


def call(engine: Engine, draw: Draw, kept: list[Any]) -> None:
    """Make one call; handles and streams are kept for later calls."""
    name = draw.random.choice(
        ("submit",) * 8 + ("stream",) * 3 + ("generate",) * 3 + ("handle",) * 8 + ("look",)
    )
    match name:
        case "submit":
            kept.append(engine.submit(*draw.submission()))
        case "stream":
            kept.append(engine.stream(*draw.submission()))
        case "generate":
            on_output: Any = draw.random.choice((None, _ignore, 5))
            engine.generate(*draw.batch(), draw.of([False]), on_output)
        case "handle" if kept:
            use(kept.pop(draw.random.randrange(len(kept))), draw)
        case "look":
            look = draw.random.choice(
                (engine.health, engine.report, engine.step_trace, engine.flight_record,
                 lambda: engine.metrics(draw.of((1.0, 5))))
            )  # fmt: skip
            look()


def use(one: Any, draw: Draw) -> None:
    act = draw.random.choice(("result", "abort", "iterate", "close", "drop", "twice"))
    match act:
        case "result" if hasattr(one, "result"):
            one.result(draw.timeout())
        case "abort" | "twice" if hasattr(one, "abort"):
            for _ in range(1 + (act == "twice")):
                one.abort()
        case "iterate":
            for _ in one:
                if draw.random.random() < 0.5:
                    break
        case "close" if hasattr(one, "close"):
            one.close()


async def call_async(engine: AsyncEngine, draw: Draw, kept: list[Any]) -> None:
    name = draw.random.choice(("submit", "stream", "generate", "handle", "handle", "look", "all"))
    match name:
        case "all":
            some = draw.several(lambda: engine.checked(*draw.submission()))
            kept.extend(engine.submit_all(draw.of([some])))
        case "submit":
            kept.append(engine.submit(*draw.submission()))
        case "stream":
            kept.append(engine.stream(*draw.submission()))
        case "generate":
            await engine.generate(*draw.batch())
        case "handle" if kept:
            await use_async(kept.pop(draw.random.randrange(len(kept))), draw)
        case "look":
            await draw.random.choice((engine.health, engine.report, engine.step_trace))()


async def use_async(one: Any, draw: Draw) -> None:
    act = draw.random.choice(("result", "abort", "iterate", "close", "drop"))
    match act:
        case "result" if hasattr(one, "result"):
            await one.result()
        case "abort" if hasattr(one, "abort"):
            one.abort()
        case "iterate" if hasattr(one, "__anext__"):
            async for _ in one:
                if draw.random.random() < 0.5:
                    break
        case "close" if hasattr(one, "close"):
            one.close()


LINES = (
    b'{"prompt": "a"}', b'{"prompt_token_ids": [1, 2, 3], "dp_rank": 1}',
    b'{"prompt": "The", "temperature": 0.5, "logit_bias": {"3": 1.5}, "stop": ["x"]}',
    b'{"prompt": "a", "timeout_s": 5, "logprobs": 2, "seed": 3, "max_tokens": 3}',
)  # fmt: skip
PIECES = (
    b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 5000, b'"\\ud800"', b"\xff\xfe", b"\x00", b"null",
    b"[" * 3000, b"{" * 500, b'{"a":' * 300, b"}", b"]", b'"', b",", b":", b"true", b'"x"',
    b'"prompt"', b'"max_tokens"', b'"structured_outputs"', b'{"json": {}}', b"\n", b"\xe2\x80\xa8",
    b"0x10", b"'a'", b"\xc3", b"[1, [2]]", b"1.0",
)  # fmt: skip


def line_of(draw: random.Random) -> bytes:
    """A line of a prompt file with a few mistakes, perhaps none."""
    line = bytearray(draw.choice(LINES))
    for _ in range(draw.randrange(4)):
        at = draw.randrange(len(line) + 1)
        line[at : at + draw.randrange(9)] = draw.choice(PIECES) if draw.random() < 0.7 else b""
    return bytes(line)
