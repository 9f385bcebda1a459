"""Requests that were right once, with up to two mutations; a seed makes the same ones."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

SEEDS: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "A class", "max_tokens": 3, "n": 2, "stop": ["x", "yy"], "seed": 5, "echo": True,
         "logprobs": 2, "logit_bias": {"5": 1.0}, "temperature": 0.5, "top_p": 0.9, "top_k": 5},
        {"prompt": [[1, 2, 3], [4]], "max_tokens": 2, "stream": True, "prompt_logprobs": 1,
         "stream_options": {"include_usage": True, "continuous_usage_stats": True},
         "return_token_ids": True, "dp_rank": 1, "min_tokens": 1, "priority": 3},
        {"model": "tiny_model", "prompt": ["a", "b"], "max_tokens": 4, "stop_token_ids": [7],
         "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1,
         "min_p": 0.1, "ignore_eos": True, "bad_words": ["the"], "allowed_token_ids": [5, 6, 7],
         "truncate_prompt_tokens": 2, "user": "me", "request_id": "mine", "best_of": 1},
        {"prompt": "A", "max_tokens": 3, "structured_outputs": {"regex": "[a-c]{1,3}"}},
        {"prompt": "A", "max_tokens": 3, "response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "object", "properties": {"a": {"enum": [1, "b"]}}}}}},
    ],
    "/v1/chat/completions": [
        {"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}],
         "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "stream": True},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                      {"role": "assistant", "content": "A"}], "max_completion_tokens": 3,
         "continue_final_message": True, "add_generation_prompt": False, "echo": True, "n": 2,
         "chat_template_kwargs": {"x": 1}},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "2"}], "max_tokens": 3,
         "reasoning_effort": "low", "response_format": {"type": "json_object"}},
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "tool_choice": "auto",
         "tools": [{"type": "function", "function": {"name": "f", "parameters": {
             "type": "object", "properties": {"a": {"type": "integer"}}}}}]},
    ],
    "/tokenize": [{"prompt": "A class", "add_special_tokens": True, "return_token_strs": True}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
    "/v1/abort": [{"request_id": "cmpl-x"}, {"request_ids": ["cmpl-x", "cmpl-y"]}],
}  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, 5e-324, 2**31, 2**63, -(2**63) - 1, 10**400,
    float("nan"), float("inf"), "", "a", "\0", "\ud800", "é☃𝄞", "7", "auto", "none", "x" * 3000,
    [], [[]], [None], [1], ["a"], [1, "a"], [[1]], [-1], {}, {"a": 1}, {"a": {"a": {"a": []}}},
    {"type": "text", "text": "\udfff"}, {"role": "user"}, [{}], [{"role": 1, "content": 2}],
)  # fmt: skip
NAMES = ("x", "", "prompt", "messages", "\ud800", "a" * 500, "stream", "tools", "functions")
BYTES = (b"\0", b"\xff", b'"', b"{", b"]", b",", b"\\u", b"\\", b"1e999", b"-", b"\xed\xa0\x80")
LENGTHS = ("max_tokens", "max_completion_tokens")  # else an answer is as long as the context


@dataclass(frozen=True)
class Mutant:
    path: str
    body: bytes


def mutants(seed: int, count: int) -> list[Mutant]:
    source = random.Random(seed)
    return [_mutant(source) for _ in range(count)]


def _mutant(source: random.Random) -> Mutant:
    path = source.choice([*SEEDS, *["/v1/completions", "/v1/chat/completions"] * 2])
    body: Any = json.loads(json.dumps(source.choice(SEEDS[path])))
    for _ in range(source.choice((0, 1, 1, 2))):
        _mutate(body, source)
    encoded = json.dumps(body, ensure_ascii=source.random() < 0.7).encode(errors="surrogatepass")
    return Mutant(path, _broken(encoded, source) if source.random() < 0.15 else encoded)


def _mutate(container: Any, source: random.Random) -> None:
    """Change, drop, move or add an entry, here or further inside."""
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    key = source.choice(keys) if keys else None
    inner = container[key] if keys else None
    if isinstance(inner, dict | list) and inner and source.random() < 0.6:
        _mutate(inner, source)
        return
    match source.randrange(6):
        case 0 if key is not None and key not in LENGTHS:
            del container[key]
        case 1 if isinstance(container, dict):
            container[source.choice(NAMES)] = deepcopy(source.choice(VALUES))
        case 2 if isinstance(container, list):
            container += [deepcopy(source.choice(VALUES))] * source.choice((1, 70))
        case 3 if key is not None:
            container[key] = [inner] * source.choice((1, 3))
        case _ if key is not None:
            allowed = [each for each in VALUES if key not in LENGTHS or each is not None]
            container[key] = deepcopy(source.choice(allowed))


def _broken(body: bytes, source: random.Random) -> bytes:
    at = source.randrange(len(body) + 1)
    if source.random() < 0.3:
        return body[:at]
    return body[:at] + source.choice(BYTES) + body[at + source.randrange(3) :]
