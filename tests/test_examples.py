"""The examples run as they stand; ranks of the numbered ones are threads here."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

from examples.seed_crash_replay import SHAPES, refuse_the_call


def shown(example: str, capsys: pytest.CaptureFixture[str]) -> str:
    import_module(f"examples.{example}").main(launcher="thread")
    return capsys.readouterr().out


def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown("01_generate", capsys)
    assert "[rank 0, length] The list of arguments → is passed to the function." in text
    assert re.findall(r"^\[rank (\d), length\]", text, re.MULTILINE) == ["0", "1", "2"]


def test_stream(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown("02_stream", capsys)
    assert re.match(r"Return a new\b.{20}", text, re.DOTALL)
    assert re.search(r"^meanwhile, on rank 1: \w", text, re.MULTILINE)
    tokens = re.search(r"^given up after (\d+) tokens$", text, re.MULTILINE)
    assert tokens
    assert int(tokens[1]) < 512


def test_uneven_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown("03_uneven_ranks", capsys).splitlines()
    rows = [[tuple(map(int, row.split(", "))) for row in re.findall(r"\((.*?)\)", line)]
            for line in lines[1:-1]]  # fmt: skip
    prompts, decodes = 40 + 9 + 9 + 5, (8 + 6 + 4 + 2) - 4
    assert sum(sum(real) for real, _ in rows) == prompts + decodes
    assert all(real[2] == 0 and gathered == (max(real),) * 3 for real, gathered in rows)
    assert re.match(r"padding_waste 0\.\d\d, row_balance 0\.\d\d", lines[-1])


def test_your_own_model(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = re.findall(r"\[.*\]", shown("04_your_own_model", capsys))
    assert ours == theirs
    assert len(ours.split(",")) == 12


@pytest.mark.parametrize("shape", SHAPES)
def test_the_call_of_the_crash_is_refused(shape: str) -> None:
    heads = SHAPES[shape]
    rest = f"{heads.q}, {heads.dim})"
    expected = f"q shape is (12, {rest}, the metadata and the pool say (10, {rest}"
    assert refuse_the_call(heads).endswith(expected)
