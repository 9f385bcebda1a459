import json
import math
from typing import Any

import numpy as np
import pytest

from dp_runtime.core.sampling_params import MAX_LOGPROBS, SamplingParams
from dp_runtime.errors import MAX_SHOWN

NAN, INF, HUGE = math.nan, math.inf, 10**400

BAD: dict[str, list[Any]] = {
    "max_tokens": [0, -1, 1.0, "16", True, NAN, np.float64(3), np.bool_(True)],
    "min_tokens": [-1, 17, 0.0, "1", None, False],
    "temperature": [-0.1, NAN, INF, -INF, "0.5", None, True, HUGE, 1j, np.float32(NAN)],
    "top_k": [-2, 1.5, "5", None, True, NAN],
    "top_p": [0, 0.0, -0.5, 1.01, NAN, "1", None, True],
    "timeout_s": [-0.1, NAN, INF, "1", True, HUGE],
    "min_p": [-0.01, 1.5, NAN, "0", None, False],
    "presence_penalty": [-2.1, 2.1, NAN, "1", None, True],
    "frequency_penalty": [-2.1, 2.1, INF, "1", None, True],
    "repetition_penalty": [0, 0.0, -1.0, 1001, NAN, INF, "1", None, True, HUGE],
    "logit_bias": [
        None, [1], "1", {"1": 2.0}, {1.0: 2.0}, {True: 2.0}, {-1: 2.0}, {1: NAN}, {1: INF},
        {1: "2"}, {1: None}, {1: True}, {1: 1e10}, {1: HUGE},
    ],
    "seed": [-1, 2**63, 1.0, "1", True, NAN],
    "stop": [5, None, "", ["a", ""], ["a", 1], b"a", [b"a"], {"a"}, "a\ud800"],
    "stop_token_ids": [5, None, "", "12", ["1"], [1.0], [-1], [True], [NAN], {1}],
    "bad_words": [5, None, "a", ["a", ""], [1], b"a", {"a"}, ["a\ud800"], ["a"] * 1001],
    "allowed_token_ids": [5, [], (), "12", ["1"], [1.0], [-1], [True], {1}],
    "structured_outputs": [5, True, "a", ["a"], b"a", {"a"}],
    "include_stop_str_in_output": [0, 1, "no", None],
    "ignore_eos": [0, 1, "no", None],
    "skip_special_tokens": [0, 1, "no", None],
    "return_routed_experts": [0, 1, "no", None],
    "priority": [2**31, -(2**31), 0.0, "1", None, True],
    "logprobs": [-1, MAX_LOGPROBS + 1, 1.0, "1", True, NAN],
    "cache_salt": ["", 5, b"a", ["a"], True, "a\ud800"],
    "truncate_prompt_tokens": [0, -2, 1.0, "5", True, 2**31],
    "prompt_logprobs": [-1, MAX_LOGPROBS + 1, 1.0, "1", False, INF],
}  # fmt: skip
CASES = [(name, value) for name, values in BAD.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=str)
def test_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the text is checked below
        SamplingParams(**{name: value})
    text, shown = str(caught.value), repr(value)
    shown = shown if len(shown) <= MAX_SHOWN else shown[: MAX_SHOWN - 3] + "..."
    assert text.startswith(f"{name}: {shown} is not allowed; "), text
    assert "\n" not in text


def test_every_field_has_bad_values() -> None:
    assert BAD.keys() == SamplingParams.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": np.int64(3), "min_tokens": np.int32(3)},
        {"temperature": np.float32(0.5), "top_p": np.float64(0.5), "min_p": 1},
        {"temperature": 0}, {"temperature": 5e-324}, {"temperature": 1e300},
        {"top_k": -1}, {"top_k": np.int16(4)}, {"top_k": 10**9}, {"top_p": 1}, {"top_p": 1e-300},
        {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 1000},
        {"logit_bias": {0: -1e9, np.int64(5): np.float32(2)}},
        {"seed": 0}, {"seed": 2**63 - 1}, {"seed": np.int64(1)},
        {"stop": "a"}, {"stop": ["a", "b"]}, {"stop": ()},
        {"stop_token_ids": (1, np.int64(2))}, {"ignore_eos": True},
        {"max_tokens": None, "min_tokens": 5}, {"include_stop_str_in_output": True},
        {"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": np.int64(5)},
        {"bad_words": ["a", " b"]}, {"bad_words": ()}, {"allowed_token_ids": [np.int64(3), 3]},
        {"logprobs": 0, "prompt_logprobs": MAX_LOGPROBS},
    ],
    ids=str,
)  # fmt: skip
def test_good_values(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    kept = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    assert {name: getattr(params, name) for name in values} == kept


def test_derived() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().greedy
    assert not SamplingParams().has_penalties
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert SamplingParams(**dict[str, Any]({name: 0.5})).has_penalties
    assert SamplingParams(stop="end").stop_strings == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


def test_from_fields_reads_json() -> None:
    values = json.loads('{"temperature": 0.5, "logit_bias": {"7": 1, "12": -2.5}, "stop": ["x"]}')
    params = SamplingParams.from_fields(values)
    assert params.logit_bias == {7: 1, 12: -2.5}
    assert params.temperature == 0.5
    assert values["logit_bias"] == {"7": 1, "12": -2.5}, "the input stays as it was"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"temprature": 0.5}, "temprature: 0.5 is not allowed; known fields: allowed_token_ids,"),
        ({"greedy": True}, "greedy: True is not allowed"),
        ({5: 1}, "5: 1 is not allowed"),
        ({"logit_bias": {"x": 1}}, "logit_bias: {'x': 1} is not allowed; keys are token ids"),
        ({"logit_bias": {"1.5": 1}}, "logit_bias: {'1.5': 1} is not allowed"),
        ({"logit_bias": {1.5: 1}}, "logit_bias: {1.5: 1} is not allowed"),
        ({"logit_bias": {True: 1}}, "logit_bias: {True: 1} is not allowed"),
        ({"logit_bias": [1]}, "logit_bias: [1] is not allowed"),
        ({"max_tokens": "4"}, "max_tokens: '4' is not allowed"),
        ([1], "sampling parameters: [1] is not allowed; a mapping"),
    ],
    ids=str,
)
def test_from_fields_names_what_is_wrong(values: Any, text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the text is checked below
        SamplingParams.from_fields(values)
    assert str(caught.value).startswith(text)


def test_check_vocabulary() -> None:
    params = SamplingParams(logit_bias={9: 1.0}, stop_token_ids=[9], min_tokens=2)
    params.check_vocabulary(10, {9})
    with pytest.raises(ValueError, match=r"logit_bias: \{9: 1.0\} .*; token ids below 9"):
        params.check_vocabulary(9, {9})
    with pytest.raises(ValueError, match=r"stop_token_ids: \[10\] .*; token ids below 10"):
        SamplingParams(stop_token_ids=[10]).check_vocabulary(10, {10})
    with pytest.raises(ValueError, match=r"min_tokens: 2 .* every token is a stop token"):
        params.check_vocabulary(10, range(10))
    SamplingParams().check_vocabulary(10, range(10))
    few = SamplingParams(allowed_token_ids=[2, 3], min_tokens=1, bad_words=["x"])
    few.check_vocabulary(10, {3}, [(3,), (7,), (2, 2)])
    with pytest.raises(ValueError, match=r"allowed_token_ids: \[2, 3\] .*; token ids below 3"):
        few.check_vocabulary(3, {3})
    with pytest.raises(ValueError, match=r"bad_words: \('x',\) .*; words that leave a token"):
        few.check_vocabulary(10, {3}, [(3,), (2,)])
    with pytest.raises(ValueError, match=r"min_tokens: 1 .* every token is a stop token"):
        few.check_vocabulary(10, {3}, [(2,)])
    SamplingParams(min_tokens=1).check_vocabulary(10, {9, 10, 11})
