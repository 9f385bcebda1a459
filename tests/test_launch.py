"""The command line in this process, with ranks that are threads."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.cli.main import main
from dp_runtime.errors import RankFailed, StartError
from dp_runtime.metrics.memory import memory_table
from tests.checkpoints import tiny_checkpoint
from tests.traces import check_trace

LETTERS = "_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 27 letters, whose tokenizer knows each of them."""
    directory = tiny_checkpoint(tmp_path_factory.mktemp("letters"), vocab_size=len(LETTERS))
    letters = Tokenizer(models.BPE({letter: at for at, letter in enumerate(LETTERS)}, []))
    letters.pre_tokenizer = pre_tokenizers.Metaspace("_", "never")
    letters.decoder = decoders.Metaspace("_", "never")
    letters.save(str(directory / "tokenizer.json"))
    return directory


def run(command: str, model: Path, *arguments: str) -> int:
    fixed = ("--model", str(model), "--launcher", "thread", "--max-model-len", "256")
    return main([command, *fixed, "--dp-size", "2", *arguments])


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate_writes_a_trace(model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    assert run("generate", model, "--prompt", "abc", "--trace", str(trace)) == 0
    assert {event["name"] for event in check_trace(trace.read_text())} >= {"target (eager)"}


def test_generate_from_a_file_to_a_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"prompt": "hello", "dp_rank": 1},
        {"prompt_token_ids": [3, 1, 4], "max_tokens": 3, "ignore_eos": True, "dp_rank": 0},
        {"prompt": "stop here", "temperature": 0.9, "seed": 5, "ignore_eos": True},
    ]
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    flags = ("--max-tokens", "7", "--prompts", str(prompts), "--output", str(output))
    assert run("generate", model, *flags) == 0
    written = read_lines(output)
    assert [list(line) for line in written] == [
        ["index", "token_ids", "text", "finish_reason", "dp_rank"]
    ] * 3
    config = EngineConfig(str(model), dp_size=2, launcher="thread", max_model_len=256)
    with Engine(config) as engine:
        expected = engine.generate(
            ["hello", [3, 1, 4], "stop here"],
            [
                SamplingParams(max_tokens=7, temperature=0.0),
                SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True),
                SamplingParams(max_tokens=7, temperature=0.9, seed=5, ignore_eos=True),
            ],
            [1, 0, None],
        )
    for index, (line, result) in enumerate(zip(written, expected, strict=True)):
        assert line["index"] == index
        assert tuple(line["token_ids"]) == result.token_ids
        assert line["text"] == result.text
        assert line["finish_reason"] == result.finish_reason
    assert [line["dp_rank"] for line in written[:2]] == [1, 0]
    assert len(written[1]["text"]) == len(written[1]["token_ids"]) == 3
    shown = capsys.readouterr().out
    assert "requests 3 " in shown
    assert "rank 1" not in shown  # the results are in the file


def test_generate_shows_texts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--prompt", "abc", "--prompt", "x", "--max-tokens", "4", "--ignore-eos")
    assert run("generate", model, *arguments) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^\[rank [01], length\] (abc|x) →.{4}$", shown, re.MULTILINE)) == 2
    assert "output tokens 8 " in shown


def test_bench_writes_a_report_and_a_trace(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, trace = tmp_path / "report.json", tmp_path / "trace.json"
    load = ("--num-requests", "6", "--input-len", "3", "9", "--output-len", "4", "4")
    assert run("bench", model, *load, "--json", str(report), "--trace", str(trace)) == 0
    shown = capsys.readouterr().out
    assert "padding_waste" in shown
    assert re.search(r"busy median \d+\.\d+ ms, longest \d+\.\d+ ms; wait median", shown)
    values = json.loads(report.read_text())
    assert (values["requests"], values["output_tokens"]) == (6, 24)
    assert 18 <= values["prompt_tokens"] <= 54
    assert values["tokens_per_s"] == pytest.approx(24 / values["elapsed_s"])
    assert 0 <= values["padding_waste"] < 1
    assert values["workload"] == {
        "num_requests": 6, "input_len": [3, 9], "output_len": [4, 4], "seed": 0,
    }  # fmt: skip
    events = check_trace(trace.read_text())
    assert {event["pid"] for event in events} == {1, 2}
    steps = {event["args"]["step"] for event in events if event["name"] == "commit"}
    assert len(steps) == values["steps"]


@pytest.mark.parametrize("sharding", ["ep", "tp"])
def test_inspect_tells_what_the_engine_then_has(
    model: Path, sharding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", model, "--moe-sharding", sharding, "--max-num-requests", "5") == 0
    shown = capsys.readouterr().out
    assert "Qwen3MoeForCausalLM: 2 layers (2 MoE), hidden 64, vocabulary 27" in shown
    assert "torch_ref: the only backend for device cpu" in shown
    lines = shown.splitlines()
    assert lines[-1].endswith("of the ranks 1 can hold the experts; min_dp_size is 2")
    rows = [line.replace(",", "").split() for line in lines[-7:-5]]
    fields: dict[str, Any] = {"moe_sharding": sharding, "max_num_requests": 5}
    config = EngineConfig(str(model), dp_size=2, launcher="thread", max_model_len=256, **fields)
    with Engine(config) as engine:
        for row, rank in zip(rows, engine.health(), strict=True):
            pages, cache_tokens = map(int, row[3:])
            assert int(row[0]) == rank.dp_rank
            assert rank.bytes_total == rank.bytes_read
            assert pages == rank.num_pages
            assert cache_tokens == engine.model.cache_tokens
        memory = [rank.memory for rank in engine.health() if rank.memory]
        assert lines[-5:-1] == memory_table(memory).splitlines()
        for rank, use in zip(engine.health(), memory, strict=True):
            assert rank.bytes_read <= use.predicted.weights < rank.bytes_read * 1.02
            assert use.predicted.kv_cache == rank.num_pages * 64 * 2 * 2 * 2 * 16 * 4
            assert use.measured is None, "nothing is measured on a CPU"


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert "{generate,serve,top,bench,experiment,report,replay,inspect,doctor}" in shown


@pytest.mark.parametrize("command", ["generate", "bench", "inspect"])
def test_every_flag_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    flags = capsys.readouterr().out.split("options:")[1]
    lines = re.findall(r"^  --?\S.*(?:\n {6,}.*)*", flags, re.MULTILINE)
    assert len(lines) > 20
    unexplained = [line for line in lines if len(line.split()) < 4]
    assert unexplained == []


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (RankFailed("the process of rank 1 ended (SIGKILL)"), 1, "error: the process of rank 1"),
        (StartError("rank 0: OSError: full"), 1, "error: rank 0: OSError: full"),
        (ValueError("dp_size: 0"), 2, "error: dp_size: 0"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_status(
    error: BaseException,
    status: int,
    shown: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(Engine, "generate", fail)
    assert run("generate", model) == status
    errors = capsys.readouterr().err
    assert errors.startswith(shown)
    assert errors.count("\n") == (1 if shown else 0)


def test_a_file_for_results_is_checked_before_anything_starts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("generate", model, "--output", str(tmp_path / "none" / "out.jsonl"))
    assert "is not a file in an existing directory" in capsys.readouterr().err


def test_prompts_from_a_pipe(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.write(write, b'{"prompt": "abc", "max_tokens": 2, "ignore_eos": true}\n')
    os.close(write)
    stdin = os.dup(0)
    os.dup2(read, 0)
    try:
        assert run("generate", model, "--prompts", "/dev/stdin") == 0
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(read)
    shown = capfd.readouterr()
    assert re.match(r"\[rank [01], length\] abc →..\n", shown.out)
    assert shown.err == ""
