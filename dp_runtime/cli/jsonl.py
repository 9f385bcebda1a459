"""Prompt files: one JSON object per line in, one per finished request out."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dp_runtime.core.plain_values import plain_int
from dp_runtime.core.request import Prompt, RequestOutput
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.errors import one_line, require, shown

MAX_BYTES = 1 << 30  # of a prompt file: a device may have no end
PROMPT_FIELDS = ("prompt", "prompt_token_ids", "dp_rank")


@dataclass(frozen=True)
class PromptLine:
    prompt: Prompt
    params: SamplingParams
    dp_rank: int | None


def read_prompts(path: Path, defaults: SamplingParams) -> list[PromptLine]:
    """Read `{"prompt": ...}` or `{"prompt_token_ids": [...]}` lines.

    A line may have `dp_rank` and any field of SamplingParams; `defaults` fills the others.
    Raises ValueError naming file, line and field; blank lines are skipped.
    """
    lines = []
    for number, text in enumerate(_read(path).split("\n"), 1):
        if text.strip():
            try:
                lines.append(_parse(text, defaults))
            except ValueError as error:
                raise ValueError(one_line(f"{path}:{number}: {error}")) from None
    require(bool(lines), "prompts", str(path), "a file with at least one line")
    return lines


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        require(len(content) <= MAX_BYTES, "prompts", str(path), f"at most {MAX_BYTES:,} bytes")
        return content.decode("utf-8-sig")
    except OSError as error:
        why = error.strerror
    except UnicodeDecodeError as error:
        raise ValueError(one_line(f"{path}: not UTF-8: {error}")) from None
    raise ValueError(f"prompts: {shown(str(path))} is not allowed; an existing JSONL file ({why})")


def _parse(text: str, defaults: SamplingParams) -> PromptLine:
    try:
        line: Any = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}"
        raise ValueError(f"not JSON: {where}: {shown(text, 40)}") from None
    except RecursionError:
        raise ValueError(f"not JSON: nested too deeply: {shown(text, 40)}") from None
    require(isinstance(line, dict), "line", line, "a JSON object")
    given = [name for name in ("prompt", "prompt_token_ids") if name in line]
    require(len(given) == 1, "prompt", given, "either prompt or prompt_token_ids")
    prompt, kind = line[given[0]], str if given[0] == "prompt" else list
    require(isinstance(prompt, kind), given[0], prompt, f"a {kind.__name__}")
    known = {item.name: getattr(defaults, item.name) for item in fields(defaults)}
    sampling = {name: value for name, value in line.items() if name not in PROMPT_FIELDS}
    rank = line.get("dp_rank")
    ok = rank is None or (plain_int(rank) is not None and rank >= 0)
    require(ok, "dp_rank", rank, "null or the number of a rank")
    return PromptLine(prompt, SamplingParams.from_fields(known | sampling), rank)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a name given twice, of which one value would be lost."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        require(name not in values, name, value, "a name is given once")
        values[name] = value
    return values


def output_line(index: int, output: RequestOutput) -> str:
    """Write a result in one line: index, token_ids, text, finish_reason, dp_rank."""
    line = {
        "index": index,
        "token_ids": output.token_ids,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "dp_rank": output.dp_rank,
    }
    return json.dumps(line, ensure_ascii=False) + "\n"
