"""Schemas, regexes and choices that texts of any model must fit, and what is refused."""

from __future__ import annotations

from typing import Any

WORD = {"type": "string", "maxLength": 8}
FLAG = {"type": "boolean"}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
CENTS = {"type": "number", "minimum": -2, "maximum": 20, "multipleOf": 0.01}


COMPACT = {"x-guidance": {"whitespace_flexible": False}}  # the model likes spaces


def record(required: Any = None, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {
        "type": "object", "properties": properties, "required": names,
        "additionalProperties": False,
    }  # fmt: skip


def text(**more: Any) -> dict[str, Any]:
    return {"type": "string", **more}


def items(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": schema, **more}


TREE = {
    "$defs": {"leaf": DIGIT, "branch": record(left=DIGIT, right={"$ref": "#/$defs/leaf"})},
    "anyOf": [{"$ref": "#/$defs/branch"}, {"$ref": "#/$defs/leaf"}],
}
LIST = {"$defs": {"node": record(["value"], value=DIGIT, next={"$ref": "#/$defs/node"})}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "null": {"type": "null"},
    "boolean": FLAG,
    "string": WORD,
    "integer": {"type": "integer", "minimum": -1000, "maximum": 1000},
    "number": CENTS,
    "types": {"type": ["integer", "boolean", "null"], "minimum": 0, "maximum": 99},
    "enum": {"enum": ["red", "green", "blue"]},
    "enum of all types": {"enum": [None, True, 17, 2.5, "x", [1, 2], {"a": "b"}]},
    "const": {"const": "fixed"},
    "const object": {"const": {"a": [1, None], "b": "c d"}},
    "object": record(name=WORD, age=DIGIT),
    "optional": record(["b"], a=DIGIT, b=FLAG, c=WORD),
    "nothing required": record([], a=DIGIT, b=FLAG),
    "empty object": record(),
    "nested": record(a=record(b=record(c=record(d=DIGIT)))),
    "nested arrays": items(items(DIGIT, maxItems=2), minItems=1, maxItems=2),
    "array of objects": items(record(x=DIGIT, y=DIGIT), minItems=2, maxItems=2),
    "minItems": items(FLAG, minItems=3, maxItems=4),
    "maxItems": items(WORD, maxItems=2),
    "fixed items": items(CENTS, minItems=2, maxItems=2),
    "prefixItems": {"type": "array", "prefixItems": [DIGIT, WORD, FLAG], "items": False,
                    "minItems": 3},
    "prefixItems and more": {"type": "array", "prefixItems": [WORD], "items": DIGIT,
                             "maxItems": 3},
    "anyOf": {"anyOf": [DIGIT, WORD, {"type": "null"}]},
    "anyOf objects": {"anyOf": [record(kind={"const": "a"}, x=DIGIT),
                                record(kind={"const": "b"}, y=WORD)]},
    "oneOf": {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 5}, FLAG]},
    "oneOf objects": {"oneOf": [record(cat={"enum": ["tom", "kit"]}), record(dog=FLAG)]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
    "allOf objects": {"allOf": [{"type": "object", "properties": {"a": DIGIT}, "required": ["a"]},
                                {"properties": {"b": FLAG}, "required": ["b"]}],
                      "additionalProperties": False, "properties": {"a": True, "b": True}},
    "$ref": record(a={"$ref": "#/$defs/word"}, b={"$ref": "#/$defs/word"}) | {
        "$defs": {"word": WORD}},
    "definitions": items({"$ref": "#/definitions/n"}, maxItems=2) | {"definitions": {"n": DIGIT}},
    "$ref and anyOf": TREE,
    "recursive": LIST | {"$ref": "#/$defs/node"},
    "pattern": text(pattern="^[A-Z]{2}-[0-9]{3}$"),
    "pattern unanchored": text(pattern="ab", maxLength=8),
    "pattern alternatives": text(pattern="^(left|right|up{1,3})$"),
    "pattern unicode": text(pattern="^[äöü]{2,4}$"),
    "pattern escapes": text(pattern=r'^"\\[a-f]"$'),
    "minLength": text(minLength=5, maxLength=9),
    "maxLength": text(maxLength=1),
    "exact length": text(minLength=4, maxLength=4),
    "date": text(format="date"),
    "time": text(format="time"),
    "uuid": text(format="uuid"),
    "ipv4": text(format="ipv4"),
    "ipv6": text(format="ipv6"),
    "email": record(at=text(format="date"), to={"anyOf": [text(format="ipv4"), FLAG]}),
    "minimum": {"type": "integer", "minimum": 95, "maximum": 105},
    "negative": {"type": "integer", "minimum": -30, "maximum": -7},
    "exclusive": {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 12},
    "multipleOf": {"type": "integer", "minimum": 0, "maximum": 500, "multipleOf": 15},
    "additionalProperties": {"type": "object", "additionalProperties": DIGIT,
                             "patternProperties": {}, "maxProperties": 2},
    "patternProperties": {"type": "object", "patternProperties": {"^[a-c]$": DIGIT},
                          "additionalProperties": False, "maxProperties": 2},
    "names with escapes": {"type": "object", "properties": {'a "b"\n\\ü': DIGIT},
                           "required": ['a "b"\n\\ü'], "additionalProperties": False},
    "description": record(a=DIGIT) | {"title": "T", "description": "D", "default": {"a": 1},
                                      "examples": [{"a": 2}], "$schema":
                                      "https://json-schema.org/draft/2020-12/schema"},
    "many properties": record(**{f"key_{n}": {"enum": [n, -n]} for n in range(8)}),
    "tool call": record(name={"const": "get_weather"},
                        arguments=record(city=WORD, days=DIGIT, unit={"enum": ["C", "F"]})),
    "invoice": record(id=text(pattern="^INV-[0-9]{4}$"), paid=FLAG, total=CENTS,
                      lines=items(record(item=WORD, count=DIGIT), minItems=1, maxItems=2)),
}  # fmt: skip
REGEXES = (
    r"[a-z]{3,8} \d{2}",
    r"(yes|no)(, (yes|no)){2}",
    r"^\w{1,10}$",
    r"[^a-z\s]{2,6}",
    r"a{0,3}b?",
    r"(?i)hello [A-F0-9]{4}",
    r"-?[1-9][0-9]{0,3}(\.[0-9]{1,2})?",
    r"[äöü€]{1,5}!",
    r"/\\\"'\n\t\.",
    r"(ab|a)(c|bd){1,2}",
)
CHOICES = (
    ("yes", "no", "maybe so"),
    ("a", "ab", "abc", "abcd"),
    ('with "quotes"', "back\\slash", "line\nbreak", "tab\t"),
    ("größer", "日本語", "🙂🙃"),
    tuple(f"option {n}" for n in range(500)),
)
GRAMMARS = (
    'start: "x" ("y" | "z"){1,4} "w"',
    'start: NUMBER ("+" NUMBER){1,3}\nNUMBER: /[0-9]{1,3}/',
    'root ::= "[" item ("," item)? "]"\nitem ::= [a-f] [0-9]?',
    'start: "answer: " %json {"type": "boolean"}',
)
# What llguidance does not support, or nothing can fit: kind, value, a part of the reason.
REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("regex", "(", "unclosed group"),
    ("regex", "a(?=b)", "look-around"),
    ("regex", r"\bword", "not supported"),
    ("regex", "(" * 300 + "a" + ")" * 300, "invalid regex"),
    ("regex", r"[^\s\S]", "no text fits"),
    ("json", {"type": "int"}, "int"),
    ("json", {"minimum": "3"}, "minimum"),
    ("json", {"not": {"type": "null"}}, "not"),
    ("json", {"type": "integer", "multipleOf": 1000003}, "multipleOf 1000003"),
    ("json", {"type": "string", "pattern": "(?!a)b"}, "look-around"),
    ("json", {"type": "string", "format": "nonsense"}, "nonsense"),
    ("json", {"$ref": "#/$defs/none"}, "none"),
    ("json", {"$ref": "http://localhost:1/schema.json"}, "http"),
    ("json", {"type": "integer", "minimum": 5, "maximum": 4}, "nsatisfiable"),
    ("grammar", "start: missing", "missing"),
    ("grammar", "start: a\na: b\nb: a", "no text fits"),
    ("grammar", "neither one nor the other", "Expected"),
    ("grammar", "root ::= " + "(" * 9000, "recursion"),
)


def chain(length: int) -> dict[str, Any]:
    """A schema whose definitions refer to each other: the compiler goes down to the last."""
    links = {f"d{n}": {"properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(length)}
    return {"$defs": links | {f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}
