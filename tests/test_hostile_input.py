"""Requests of any kind are served or refused in one line, and a good one beside them is served."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.cli.jsonl import read_prompts
from dp_runtime.core.request import TokensPrompt
from dp_runtime.errors import EngineOverloaded
from tests.checkpoints import tiny_checkpoint
from tests.dp_runtime.engine.fake_group import outstanding
from tests.dp_runtime.hostile import FLOAT_TWOS, INT_LISTS, MAPPINGS, TWOS, junk
from tests.workers.leftovers import wait_until

NUM_BAD_INPUTS = int(os.environ.get("DP_RUNTIME_BAD_INPUTS", "60"))
HIDDEN = 64
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
JUNK = [value for name, value in junk().items() if name != "mock"]
VALUES = [*JUNK, *FLOAT_TWOS, *INT_LISTS, *MAPPINGS, "a", None, True, -1, 0, -0.0, [1]]
ANY = st.integers(0, len(VALUES) - 1)  # an index: Hypothesis calls the methods of what it draws
FIELDS = st.dictionaries(st.sampled_from(sorted(SamplingParams.__dataclass_fields__)), ANY)
PROMPTS = st.tuples(st.sampled_from(("value", "list", "TokensPrompt")), ANY, ANY, ANY)


def prompt_from(kind: str, *indices: int) -> Any:
    values = [VALUES[index] for index in indices]
    made = {"value": values[0], "list": values, "TokensPrompt": TokensPrompt(*values)}
    return made[kind]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = tiny_checkpoint(tmp_path_factory.mktemp("model"))
    config = EngineConfig(str(model), dp_size=2, launcher="thread", max_model_len=64)
    with Engine(config) as one:
        yield one


def test_any_input_is_served_or_refused_in_one_line(engine: Engine) -> None:
    expected = engine.generate([[5, 6, 7]], GREEDY)[0].token_ids

    @settings(max_examples=NUM_BAD_INPUTS, deadline=None, suppress_health_check=list(HealthCheck))
    @given(PROMPTS, FIELDS, ANY)
    def try_one(prompt: Any, fields: dict[str, int], rank: int) -> None:
        good = engine.submit([5, 6, 7], GREEDY)
        try:
            chosen: dict[str, Any] = {name: VALUES[index] for name, index in fields.items()}
            params = SamplingParams(**{"max_tokens": 2} | chosen)
            handle = engine.submit(prompt_from(*prompt), params, VALUES[rank])
        except (ValueError, EngineOverloaded) as error:
            text = str(error)
            assert text.isprintable(), text
            assert len(text) < 800, text
        else:
            handle.result(60)
        assert good.result(60).token_ids == expected

    try_one()
    wait_until(lambda: outstanding(engine) == [(0, 0), (0, 0)], "nothing is outstanding")


@pytest.mark.parametrize("prompt", INT_LISTS, ids=lambda value: type(value).__name__)
def test_prompts_of_any_integers_are_served(prompt: Any, engine: Engine) -> None:
    for given_prompt in (prompt, TokensPrompt(prompt)):
        output = engine.submit(given_prompt, GREEDY).result(60)
        assert output.prompt_token_ids == (1, 2)
        assert all(type(token) is int for token in output.prompt_token_ids)


@pytest.mark.parametrize("size", TWOS, ids=lambda value: type(value).__name__)
def test_sums_of_small_integers_do_not_wrap(size: Any, engine: Engine) -> None:
    for length in (np.uint8(55), np.int8(55), size):
        params: dict[str, Any] = {"max_tokens": length, "temperature": 0, "ignore_eos": True}
        output = engine.submit([1] * 60, SamplingParams(**params), size % 2).result(60)
        assert len(output.token_ids) == min(length if length is not size else 2, 4)


ROWS = np.linspace(-1, 1, 2 * HIDDEN).reshape(2, HIDDEN).astype(np.float32)
STRIDED = np.repeat(ROWS, 2, axis=1)[:, ::2]
GOOD_EMBEDS: dict[str, Any] = {
    "float64": ROWS.astype(np.float64), "lists": ROWS.tolist(), "strided": STRIDED,
    "reversed": ROWS[::-1].copy()[::-1], "fortran": np.asfortranarray(ROWS),
    "tensor": torch.from_numpy(ROWS), "with gradient": torch.from_numpy(ROWS).requires_grad_(),
    "big endian": ROWS.astype(">f4"),
}  # fmt: skip
BAD_EMBEDS: dict[str, Any] = {
    "complex": ROWS.astype(np.complex64), "integers": np.ones((2, HIDDEN), np.int64),
    "bools": np.ones((2, HIDDEN), bool), "objects": ROWS.astype(object),
    "structured": np.zeros((2, HIDDEN), [("a", "f4")]), "masked": np.ma.masked_invalid(ROWS),
    "too large": np.full((2, HIDDEN), 1e300), "NaN": ROWS * np.nan, "one row": ROWS[:1],
    "transposed": ROWS.T, "flat": ROWS.ravel(), "text": "rows", "bytes": ROWS.tobytes(),
    "integer tensor": torch.ones(2, HIDDEN, dtype=torch.int64), "empty": [],
    "endless": np.broadcast_to(np.float32(0), (1 << 40, HIDDEN)),
    "meta": torch.ones(2, HIDDEN, device="meta"), "nested": junk()["nested"],
    "hostile": junk()["hostile object"], "sparse": torch.ones(2, HIDDEN).to_sparse(),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD_EMBEDS)
def test_embeddings_are_copied_as_they_are(name: str, engine: Engine) -> None:
    read_only = ROWS.copy()
    read_only.flags.writeable = False
    expected = engine.submit(TokensPrompt([1, 2, 3], read_only, [0, 2]), GREEDY).result(60)
    output = engine.submit(TokensPrompt([1, 2, 3], GOOD_EMBEDS[name], (0, 2)), GREEDY).result(60)
    assert output.token_ids == expected.token_ids


@pytest.mark.parametrize("name", BAD_EMBEDS)
def test_embeddings_that_are_none_are_refused(name: str, engine: Engine) -> None:
    with pytest.raises(ValueError, match="prompt_embeds: ") as caught:
        engine.submit(TokensPrompt([1, 2, 3], BAD_EMBEDS[name], [0, 2]), GREEDY)
    assert str(caught.value).isprintable()


def test_a_buffer_that_changes_after_submit_does_not_matter(engine: Engine) -> None:
    buffer, positions, ids, bias = ROWS.copy(), [0, 2], [1, 2, 3], {1: 1.0}
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logit_bias=bias)
    expected = engine.submit(TokensPrompt([1, 2, 3], ROWS, [0, 2]), params).result(60)
    handle = engine.submit(TokensPrompt(ids, buffer, positions), params)
    buffer[:] = np.nan
    positions[0], ids[0] = 99, -1
    bias[1] = params.logit_bias[2] = float("nan")  # type: ignore[index]
    assert handle.result(60).token_ids == expected.token_ids
    with pytest.raises(ValueError, match="logit_bias: "):
        engine.submit([1], params)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "1: not JSON: nested too deeply"),
        ('{"prompt": "a", "stop": ' + "[" * 900 + "]" * 900 + "}", "1: stop: "),
        ('{"prompt": "a", "prompt": "b"}', "1: prompt: 'b' is not allowed; a name is given once"),
        ('{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', "1: 1: 2 is not allowed; a name"),
        ('{"prompt": "a", "temperature": NaN}', "1: temperature: nan"),
        ('{"prompt": "a", "top_k": ' + "9" * 5000 + "}", "1: "),
        ('{"prompt": "a", "' + "x" * 3_000_000 + '": 1}', "1: xxx"),
        ('{"prompt": "a", "x\\n\\u001b[31m": 1}', "1: x\\\\n\\\\x1b"),
        ('{"prompt": "a", "top_k": "\\ud800"}', "1: top_k: "),
    ],
    ids=range(9),
)
def test_a_line_of_a_prompt_file_is_refused_in_one_line(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(path, GREEDY)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 2000


def test_a_prompt_file_may_have_a_mark_and_any_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "\xc3\xa9"}')
    assert [line.prompt for line in read_prompts(path, GREEDY)] == ["a", "é"]
