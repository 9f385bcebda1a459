"""Published traces, as their files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dp_runtime.experiments.workload.workload import read_workload

MOONCAKE = [
    {"timestamp": 0, "input_length": 700, "output_length": 52, "hash_ids": [0, 1]},
    {"timestamp": 3052, "input_length": 1100, "output_length": 26, "hash_ids": [0, 2, 3]},
    {"timestamp": 1000, "input_length": 512, "output_length": 1, "hash_ids": [9]},
]
BURST = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
50,GPT-4,417,0,417,API log
118.5,GPT-4,36,7,43,API log
"""


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in MOONCAKE))
    return path


def test_a_mooncake_trace_has_its_times_lengths_and_shared_blocks(mooncake: Path) -> None:
    workload = read_workload({"kind": "mooncake", "path": str(mooncake)})
    found = workload.conversations(2)
    assert [each.at_s for each in found] == [0, 1, 3.052]
    assert [each.prompt_lens for each in found] == [(700,), (512,), (1100,)]
    assert [each.turns[0].output_len for each in found] == [52, 1, 26]
    first, other, last = (each.turns[0].token_ids(4000) for each in found)
    assert first[:512] == last[:512] != other
    assert first[512:] != last[512:700]


def test_lengths_and_rates_are_scaled_alike(mooncake: Path) -> None:
    scale = {"length_scale": 1 / 16, "rate_scale": 4.0, "num_requests": 2, "first_request": 1}
    workload = read_workload({"kind": "mooncake", "path": str(mooncake)} | scale)
    found = workload.conversations(2)
    assert [each.at_s for each in found] == [0, (3.052 - 1) / 4]
    assert [each.prompt_lens for each in found] == [(32,), (69,)]
    assert [segment.num_tokens for segment in found[1].turns[0].segments] == [32, 32, 5]
    whole = read_workload({"kind": "mooncake", "path": str(mooncake)} | {"length_scale": 1 / 16})
    first, _, last = (each.turns[0].token_ids(900) for each in whole.conversations(2))
    assert first[:32] == last[:32]


def test_a_burstgpt_file_has_its_times_and_lengths_without_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    path.write_text(BURST)
    table = {"kind": "burstgpt", "path": str(path), "skew": {"kind": "zipf", "exponent": 0}}
    found = read_workload(table).conversations(3)
    assert [each.at_s for each in found] == [0, 40, 113.5]
    assert [each.prompt_lens for each in found] == [(472,), (1087,), (36,)]
    assert [each.turns[0].output_len for each in found] == [18, 230, 7]
    assert sorted(each.dp_rank or 0 for each in found) == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hash_ids": [1]}, r"jsonl:1: hash_ids: \[1\] is not allowed; 2 integers"),
        ({"input_length": "many"}, "jsonl:1: input_length: 'many' is not allowed"),
        ({"timestamp": None}, "jsonl:1: timestamp: None is not allowed; milliseconds"),
    ],
)
def test_a_line_that_is_no_request_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(MOONCAKE[0] | change))
    with pytest.raises(ValueError, match=message):
        read_workload({"kind": "mooncake", "path": str(path)}).conversations(1)


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, mooncake: Path) -> None:
    with pytest.raises(ValueError, match=r"path: .* a CSV file with a column 'Timestamp'"):
        read_workload({"kind": "burstgpt", "path": str(mooncake)}).conversations(1)
    long = read_workload({"kind": "mooncake", "path": str(mooncake), "num_requests": 9})
    with pytest.raises(ValueError, match=r"num_requests: 9 is not allowed; 1..3"):
        long.conversations(1)
    with pytest.raises(ValueError, match=r"a file that exists \(No such file"):
        read_workload({"kind": "mooncake", "path": str(tmp_path / "no")}).conversations(1)
