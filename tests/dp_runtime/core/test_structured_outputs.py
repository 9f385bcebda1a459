import json
import pickle
from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.structured_outputs import MAX_BYTES, StructuredOutputs

PROPERTIES = {"b": {"const": None}, "a": {"minimum": 0.5}}
SCHEMA: dict[str, Any] = {"type": "object", "properties": PROPERTIES}


@pytest.mark.parametrize(
    "given",
    [
        SCHEMA, json.dumps(SCHEMA), json.dumps(SCHEMA, indent=4), OrderedDict(SCHEMA),
        MappingProxyType(SCHEMA), SCHEMA | {"properties": MappingProxyType(PROPERTIES)},
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_schema_is_kept_as_its_text_with_names_in_order(given: Any) -> None:
    wanted = StructuredOutputs(json=given)
    assert wanted.json == json.dumps(SCHEMA)
    assert wanted.kind == "json"
    assert wanted == StructuredOutputs(json=SCHEMA)
    assert hash(wanted) == hash(StructuredOutputs(json=SCHEMA))


def test_it_does_not_change_with_what_was_given() -> None:
    schema, choices = {"enum": [1, 2]}, ["a", "b"]
    first, second = StructuredOutputs(json=schema), StructuredOutputs(choice=choices)
    schema["enum"].append(3)
    choices.append("c")
    assert (first.json, second.choice) == ('{"enum": [1, 2]}', ("a", "b"))


def test_values_become_python_s() -> None:
    wanted = StructuredOutputs(json={"enum": (np.int64(1), np.float32(0.5), np.array([2, 3]))})
    assert wanted.json == '{"enum": [1, 0.5, [2, 3]]}'
    assert StructuredOutputs(json_object=np.True_).json_object is True  # type: ignore[arg-type]


BAD: list[tuple[dict[Any, Any], str]] = [
    ({}, r"structured_outputs: \[\] is not allowed; exactly one of json, json_object, regex"),
    ({"regex": "a", "choice": ["b"]}, r"structured_outputs: \['regex', 'choice'\] is not allowed"),
    ({"json_object": False, "regex": None}, r"structured_outputs: \[\] is not allowed"),
    ({"json": "no JSON"}, r"structured_outputs.json: 'no JSON' is not allowed; a JSON schema"),
    ({"json": "[1]"}, r"structured_outputs.json: "),
    ({"json": [1]}, r"structured_outputs.json: "),
    ({"json": "NaN"}, r"structured_outputs.json: "),
    ({"json": '{"minimum": Infinity}'}, r"structured_outputs.json: "),
    ({"json": {"minimum": float("nan")}}, r"structured_outputs.json: 'a dict' is not allowed"),
    ({"json": {"enum": [b"a"]}}, r"structured_outputs.json: "),
    ({"json": {1: "a"}}, r"structured_outputs.json: "),
    ({"json": {"enum": {1, 2}}}, r"structured_outputs.json: "),
    ({"json": "[" * 100_000}, r"structured_outputs.json: "),
    ({"json": '{"a":' * 5000 + "1" + "}" * 5000}, r"structured_outputs.json: "),
    ({"json_object": 1}, r"structured_outputs.json_object: 1 is not allowed; a bool"),
    ({"regex": ""}, r"structured_outputs.regex: '' is not allowed; a non-empty text"),
    ({"regex": 5}, r"structured_outputs.regex: 5 is not allowed"),
    ({"regex": "\ud800"}, r"structured_outputs.regex: "),
    ({"grammar": "\udfff"}, r"structured_outputs.grammar: "),
    ({"choice": []}, r"structured_outputs.choice: \[\] is not allowed; a list"),
    ({"choice": "yes"}, r"structured_outputs.choice: 'yes' is not allowed"),
    ({"choice": ["a", ""]}, r"structured_outputs.choice: "),
    ({"choice": ["a", 1]}, r"structured_outputs.choice: "),
    ({"regex": "a" * (MAX_BYTES + 1)}, r"structured_outputs.regex: '262,145 bytes' is not allowed"),
    ({"choice": ["a" * 1000] * 300}, r"structured_outputs.choice: '.* bytes' is not allowed"),
    (
        {"pattern": "a"},
        r"structured_outputs: \{'pattern': 'a'\} is not allowed; known fields: json",
    ),
    ({5: "a"}, r"structured_outputs: \{5: 'a'\} is not allowed; known fields: json"),
]


@pytest.mark.parametrize(("given", "text"), BAD, ids=lambda value: str(value)[:40])
def test_a_mistake_is_named(given: dict[Any, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SamplingParams.from_fields({"structured_outputs": given})


def test_a_schema_that_contains_itself_is_refused() -> None:
    schema: dict[str, Any] = {"type": "object"}
    schema["properties"] = {"again": schema}
    wide: Any = {"a": 1}
    for _ in range(60):
        wide = [wide, wide]
    for given in (schema, {"enum": wide}):
        with pytest.raises(ValueError, match=r"structured_outputs.json: .* is not allowed"):
            StructuredOutputs(json=given)


def test_parameters_take_fields_and_copies() -> None:
    wanted = StructuredOutputs(choice=["a"])
    of_fields = SamplingParams.from_fields({"structured_outputs": {"choice": ["a"], "json": None}})
    assert of_fields.structured_outputs == wanted
    assert SamplingParams(structured_outputs=wanted).copied().structured_outputs == wanted
    assert pickle.loads(pickle.dumps(of_fields)) == of_fields
