"""A request's StructuredOutputs as a grammar of llguidance, and what is refused before it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.errors import one_line, require

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

INSTALL = "pip install 'dp-runtime[structured]'"
MAX_MULTIPLE = 10_000  # an automaton has a state for each remainder, and no limit bounds its making
_UNESCAPED = re.compile(r"\\.|[/\n]", re.DOTALL)
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*(-?[0-9][0-9.eE+-]*)')
# Some models never leave off writing spaces where JSON allows any number of them.
_JSON: JsonCompileOptions = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,16}"}


def compilable(
    wanted: StructuredOutputs, tokenizer_json: str | None, eos_token_ids: Sequence[int]
) -> str:
    """Return the tokenizer's text; ValueError if this model can't have structured outputs."""
    installed = find_spec("llguidance") is not None
    require(installed, "structured_outputs", wanted.kind, f"None without llguidance: {INSTALL}")
    allowed = "None: the model's directory has no tokenizer.json"
    require(tokenizer_json is not None, "structured_outputs", wanted.kind, allowed)
    allowed = "None: the model has no end-of-text token"
    require(bool(eos_token_ids), "structured_outputs", wanted.kind, allowed)
    return tokenizer_json or ""


def grammar_of(wanted: StructuredOutputs) -> str:
    """Write it as llguidance reads it; ValueError if it can't be."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    match wanted:
        case StructuredOutputs(json=str(schema)):
            _check_multiples(schema)
            defaults = None if "x-guidance" in json.loads(schema) else _JSON
            return LLMatcher.grammar_from_json_schema(schema, defaults=defaults)
        case StructuredOutputs(json_object=True):
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=_JSON)
        case StructuredOutputs(regex=str(regex)):
            return LLMatcher.grammar_from_regex(regex)
        case StructuredOutputs(choice=tuple(choices)):
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, choices))}")
        case StructuredOutputs(grammar=str(text)):
            _check_multiples(text)  # of schemas within
            return LLMatcher.grammar_from_lark(any_to_lark(text))
    raise AssertionError(f"no kind of structured outputs: {wanted}")


def rule_of(wanted: StructuredOutputs, name: str) -> str:
    """Write it as a rule of a larger Lark grammar."""
    match wanted:
        case StructuredOutputs(json=str(schema)):
            with_defaults = {"x-guidance": _JSON} | json.loads(schema)
            return f"{name}: %json {json.dumps(with_defaults)}\n"
        case StructuredOutputs(json_object=True):
            return f'{name}: %json {{"type": "object", "x-guidance": {json.dumps(_JSON)}}}\n'
        case StructuredOutputs(regex=str(regex)):
            return f"{name}: /{_UNESCAPED.sub(_escaped, regex)}/\n"
        case StructuredOutputs(choice=tuple(choices)):
            return f"{name}: {' | '.join(map(json.dumps, choices))}\n"
        case StructuredOutputs(grammar=str(text)):
            from llguidance.gbnf_to_lark import any_to_lark

            return f"{name}: %lark {{\n{any_to_lark(text)}\n}}\n"
    raise AssertionError(f"no kind of structured outputs: {wanted}")


def _escaped(found: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n"}.get(found[0], found[0])


def one_error(text: str) -> str:
    """A message of llguidance in one line."""
    if text.startswith("NoExtension"):
        return "no text fits it"
    return one_line(" ".join(text.removesuffix("<non-verbose/>").split()), 400)


def _check_multiples(schema: str) -> None:
    for text in _MULTIPLE.findall(schema):
        digits = Decimal(text).normalize().as_tuple()
        assert isinstance(digits.exponent, int), "JSON has finite numbers only"
        number = int("".join(map(str, digits.digits))) * 10 ** max(0, min(digits.exponent, 10))
        if number > MAX_MULTIPLE:
            raise ValueError(f"multipleOf {text} is not supported, only up to {MAX_MULTIPLE:,}")
