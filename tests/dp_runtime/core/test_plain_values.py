"""Whatever a user gives is read into Python's own types once, or refused by name in one line."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from dp_runtime.config import EngineConfig
from dp_runtime.core.plain_values import (
    plain_bool,
    plain_float,
    plain_int,
    plain_ints,
    plain_items,
    plain_list,
    plain_str,
    plain_timeout,
)
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.settings import settings_of
from tests.dp_runtime.hostile import (
    FLOAT_TWOS,
    INT_LISTS,
    MAPPINGS,
    TWOS,
    Device,
    HostileStr,
    junk,
)


def kind(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("value", TWOS, ids=kind)
def test_integers_become_python_s(value: Any) -> None:
    read = plain_int(value)
    assert read == 2
    assert type(read) is int


@pytest.mark.parametrize("value", FLOAT_TWOS, ids=kind)
def test_numbers_become_python_s(value: Any) -> None:
    read = plain_float(value)
    assert read == 2.0
    assert type(read) is float


@pytest.mark.parametrize("value", INT_LISTS, ids=kind)
def test_lists_of_integers_become_python_s(value: Any) -> None:
    read = plain_ints(value)
    assert read == [1, 2]
    assert all(type(entry) is int for entry in read)


@pytest.mark.parametrize("value", [True, False, np.True_, np.array(False), torch.tensor(True)])
def test_a_bool_is_no_number(value: Any) -> None:
    assert type(plain_bool(value)) is bool
    assert plain_int(value) is None
    assert plain_float(value) is None
    assert plain_ints([value]) is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0.0), (np.float32(2), 2.0), (math.inf, math.inf), (torch.tensor(math.inf), math.inf),
        (-1, None), (-math.inf, None), (math.nan, None), (True, None), ("1", None), (10**400, None),
    ],
    ids=str,
)  # fmt: skip
def test_a_timeout_may_be_infinite(value: Any, seconds: float | None) -> None:
    assert plain_timeout(value) == seconds
    assert plain_float(value) != math.inf


def test_zero_has_no_sign() -> None:
    for zero in (-0.0, np.float32(-0.0), np.array(-0.0)):
        read = plain_float(zero)
        assert read is not None
        assert math.copysign(1.0, read) == 1.0


def test_texts_become_python_s() -> None:
    for text in ("cpu", Device.CPU, np.str_("cpu"), HostileStr("cpu")):
        read = plain_str(text)
        assert read is not None
        assert type(read) is str
        assert read == "cpu"


@pytest.mark.parametrize("name", junk())
def test_what_is_none_of_these_is_not_read(name: str) -> None:
    for read in (plain_bool, plain_str):
        assert read(junk()[name]) is None
    if "huge" not in name or name == "huge array":
        assert plain_int(junk()[name]) is None
        assert plain_float(junk()[name]) is None
    assert plain_ints(junk()[name]) is None


def test_sequences_without_an_end_and_mappings_that_raise_are_not_read() -> None:
    for value in (junk()["hostile sequence"], junk()["huge array"], "12", b"12", {1, 2}, {1: 2}):
        assert plain_list(value) is None
    for value in (junk()["halfway"], junk()["hostile mapping"], [(1, 2.0)], None):
        assert plain_items(value) is None


@pytest.mark.parametrize("bias", MAPPINGS, ids=kind)
def test_parameters_hold_plain_values(bias: Any) -> None:
    given: dict[str, Any] = {
        "max_tokens": np.uint8(200), "seed": np.uint64(7), "temperature": np.array(-0.0),
        "stop": [HostileStr("a")], "stop_token_ids": np.array([3], np.uint8),
        "ignore_eos": np.True_, "logit_bias": bias,
    }  # fmt: skip
    params = SamplingParams(**given)
    assert params.known_max_tokens + 100 == 300
    assert (params.stop, params.stop_token_ids) == (("a",), (3,))
    assert params.logit_bias == {2: 2.0}
    assert params.greedy
    for token, value in params.logit_bias.items():
        assert (type(token), type(value)) == (int, float)
    assert [type(one) for one in (*params.stop, *params.stop_token_ids)] == [str, int]
    assert params.ignore_eos is True


def test_parameters_do_not_change_with_what_was_given() -> None:
    stop, ids, bias = ["a"], [1], {1: 1.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias)
    stop.append("")
    ids.append(-1)
    bias[-1] = math.nan
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a",), (1,), {1: 1.0})


def test_one_token_has_one_bias() -> None:
    class Other(int):
        __hash__ = object.__hash__

    with pytest.raises(ValueError, match=r"logit_bias: .* each once"):
        SamplingParams(logit_bias={1: 1.0, Other(1): 2.0})
    for keys in ('{"1": 1, "01": 2}', '{"+1": 1}', '{"1_0": 1}', '{" 1": 1}', '{"\u0661": 1}'):
        with pytest.raises(ValueError, match=r"logit_bias: .* keys are token ids"):
            SamplingParams.from_fields({"logit_bias": json.loads(keys)})


FIELDS = [
    (owner, item.name) for owner in (SamplingParams, EngineConfig) for item in settings_of(owner)
] + [(SamplingParams, name) for name in ("logit_bias", "stop", "stop_token_ids")]


@pytest.mark.parametrize(
    ("owner", "field"), FIELDS, ids=lambda value: getattr(value, "__name__", value)
)
def test_each_field_refuses_junk_in_one_line(owner: Any, field: str) -> None:
    given: dict[str, Any] = {"model": "x"} if owner is EngineConfig else {}
    for name, value in junk().items():
        if name == "mock":  # it says that it is an int
            continue
        try:
            owner(**given | {field: value})
        except ValueError as error:
            text = str(error)
            assert text.startswith(f"{field}: "), (name, text)
            assert text.isprintable(), name
            assert len(text) < 600, name
        else:
            assert name in ("huge", "very huge"), name
            assert field in FLOATS, name


FLOATS = {
    item.name
    for owner in (SamplingParams, EngineConfig)
    for item in settings_of(owner)
    if item.kind is float
}


@pytest.mark.parametrize("value", [Decimal("0.5"), "0.5", 1j, b"1", None, True, np.True_])
def test_temperature_takes_real_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match="temperature: "):
        SamplingParams(temperature=value)


def test_sizes_have_bounds() -> None:
    with pytest.raises(ValueError, match=r"max_tokens: 10{19} is not allowed; .*at most 2\*\*31-1"):
        SamplingParams(max_tokens=10**19)
    for item in settings_of(EngineConfig):
        if item.kind is int:
            huge: dict[str, Any] = {item.name: 10**19}
            with pytest.raises(ValueError, match=f"{item.name}: 10{{19}} is not allowed"):
                EngineConfig("x", **huge)
