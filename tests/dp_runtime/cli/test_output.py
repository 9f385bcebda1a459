"""What a console, a disk or a locale does not take never costs a result."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dp_runtime import Engine, EngineConfig, RequestOutput, SamplingParams
from dp_runtime.cli import jsonl
from dp_runtime.cli.generate import Results
from dp_runtime.cli.main import main
from dp_runtime.errors import RankFailed
from tests.checkpoints import tiny_checkpoint

ROOT = Path(__file__).parents[3]
LETTERS = "_éabcdefghijklmnopqrstuvwxyzß→"
SHORT = ("--max-tokens", "4", "--ignore-eos")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few letters, not all of them ASCII."""
    directory = tiny_checkpoint(tmp_path_factory.mktemp("letters"), vocab_size=len(LETTERS))
    letters = Tokenizer(models.BPE({letter: at for at, letter in enumerate(LETTERS)}, []))
    letters.pre_tokenizer = pre_tokenizers.Metaspace("_", "never")
    letters.decoder = decoders.Metaspace("_", "never")
    letters.save(str(directory / "tokenizer.json"))
    return directory


def flags(model: Path) -> list[str]:
    return ["generate", "--model", str(model), "--launcher", "thread", "--max-model-len", "256"]


def launched(model: Path, *arguments: str, **how: Any) -> subprocess.Popen[Any]:
    environment = os.environ | how.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "launch.py", *flags(model), *arguments],
        cwd=ROOT, env=environment, stderr=subprocess.PIPE, **{"stdout": subprocess.PIPE} | how,
    )  # fmt: skip


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def latin_1(room: Path) -> dict[str, str]:
    """The environment of an ISO-8859-1 locale, which is made for the test."""
    if shutil.which("localedef") is None:
        pytest.skip("no localedef")
    made = subprocess.run(
        ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(room / "en_US.ISO-8859-1")],
        check=False, capture_output=True,
    )  # fmt: skip
    if made.returncode != 0:
        pytest.skip("no source of locales")
    return {"LOCPATH": str(room), "LC_ALL": "en_US.ISO-8859-1"}


RUNS = """
import sys
from dp_runtime.cli.main import main
runs = " ".join(sys.argv[1:]).split(" --then ")
for run in runs:
    status = main(run.split(" "))
    if run is not runs[-1]:
        print("status", status, flush=True)
        sys.stdin.readline()
sys.exit(status)
"""


@pytest.mark.parametrize("locale", ["C", pytest.param("ISO-8859-1", marks=pytest.mark.slow)])
def test_files_and_prompts_are_utf_8_in_any_locale_and_a_closed_pipe_is_said(
    locale: str, model: Path, tmp_path: Path
) -> None:
    """All in one interpreter, whose start takes longest."""
    env = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    env |= {"LC_ALL": "C"} if locale == "C" else latin_1(tmp_path)
    prompts, *outputs = (tmp_path / name for name in ("in.jsonl", "1.jsonl", "2.jsonl"))
    line = {"prompt": "éß", "logit_bias": {"1": 100.0}}
    prompts.write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
    from_file = [*flags(model), *SHORT, "--prompts", str(prompts), "--output", str(outputs[0])]
    from_argv = [*flags(model), *SHORT, "--prompt", "éß", "--output", str(outputs[1])]
    config = EngineConfig(str(model), launcher="thread", max_model_len=256)
    with Engine(config) as engine:
        (expected,) = engine.generate(["éß"], SamplingParams(max_tokens=4, temperature=0.0))
    with subprocess.Popen(
        [sys.executable, "-c", RUNS, *from_file, "--then", *from_argv, "--then", *flags(model),
         *SHORT],
        cwd=ROOT, env=os.environ | env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:  # fmt: skip
        assert run.stdin is not None
        assert run.stdout is not None
        assert run.stderr is not None
        assert b"status 0\n" in iter(run.stdout.readline, b"")
        run.stdin.write(b"go on\n")
        run.stdin.flush()
        assert b"status 0\n" in iter(run.stdout.readline, b"")
        run.stdout.close()
        run.stdin.write(b"go on\n")
        run.stdin.flush()
        errors = run.stderr.read()
        run.wait(60)
    assert [line["text"] for line in lines_of(outputs[0])] == ["éééé"]
    assert tuple(lines_of(outputs[1])[0]["token_ids"]) == expected.token_ids, "argv is UTF-8 too"
    assert run.returncode == 1
    assert errors == b"error: stdout: Broken pipe; 0 of 6 results were written\n"


@pytest.mark.slow
def test_a_console_without_a_character_shows_it_as_an_escape(model: Path) -> None:
    with launched(model, *SHORT, "--prompt", "é", env={"PYTHONIOENCODING": "ascii"}) as run:
        out, errors = run.communicate(timeout=200)
    assert run.returncode == 0
    assert out.startswith(rb"[rank 0, length] \xe9 \u2192")
    assert b"output tokens 4 " in out
    assert errors == b""


def test_a_full_disk_is_said_and_told_by_the_exit_status(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(model), *SHORT, "--output", "/dev/full"]) == 1
    shown = capsys.readouterr().err
    assert shown == (
        "error: output: '/dev/full': No space left on device; 0 of 6 results were written\n"
    )


@pytest.mark.slow
def test_a_full_disk_behind_stdout_is_said(model: Path) -> None:
    with open("/dev/full", "wb") as full, launched(model, *SHORT, stdout=full) as run:
        errors = run.communicate(timeout=200)[1]
    assert run.returncode == 1
    assert errors == b"error: stdout: No space left on device; 0 of 6 results were written\n"


@pytest.mark.parametrize("flag", ["--output", "--json", "--trace"])
def test_a_target_that_can_not_be_opened_is_refused_before_the_work(
    flag: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("nothing may start")

    for module in ("generate", "bench"):
        monkeypatch.setattr(f"dp_runtime.cli.{module}.Engine", never)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = "generate" if flag == "--output" else "bench"
    for target, why in ((Path("/proc/x"), "No such file"), (pipe, "No such device or address")):
        assert main([command, *flags(model)[1:], flag, str(target)]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith(f"error: {flag[2:]}: {str(target)!r} is not allowed; {why}")


def test_a_file_keeps_its_results_until_there_are_new_ones(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("old\n" * 500)
    failing = ["--attention-backend", "trtllm", "--device", "cpu"]
    assert main([*flags(model), *SHORT, *failing, "--output", str(output)]) == 2
    assert output.read_text() == "old\n" * 500
    assert main([*flags(model), *SHORT, "--prompt", "a", "--output", str(output)]) == 0
    assert [line["index"] for line in lines_of(output)] == [0]


def test_the_file_of_the_prompts_is_never_the_output(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, link, other = (tmp_path / name for name in ("in.jsonl", "link.jsonl", "out.jsonl"))
    prompts.write_text('{"prompt": "a"}')
    link.symlink_to(prompts)
    for output in (prompts, link):
        files = ["--prompts", str(prompts), "--output", str(output)]
        assert main([*flags(model), *SHORT, *files]) == 2
        expected = f"error: output: {str(output)!r} is not allowed; a file other than the one of"
        assert capsys.readouterr().err.startswith(expected)
        assert prompts.read_text() == '{"prompt": "a"}'
    shutil.copy(prompts, other)  # its text is the same, the file is not
    assert main([*flags(model), *SHORT, "--prompts", str(prompts), "--output", str(other)]) == 0
    assert lines_of(other)[0]["index"] == 0


def test_a_device_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_BYTES", 1 << 20)
    with pytest.raises(ValueError, match=r"^prompts: '/dev/zero' .* at most 1,048,576 bytes$"):
        jsonl.read_prompts(Path("/dev/zero"), SamplingParams())


def test_results_are_in_the_file_while_others_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "max_tokens": 250}]
    prompts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    take = Results.take

    def fail_after_two(self: Results, index: int, made: RequestOutput) -> None:
        take(self, index, made)
        if index == 1:
            assert len(lines_of(output)) == 2, "both are in the file by now"
            raise RankFailed("gone")

    monkeypatch.setattr(Results, "take", fail_after_two)
    files = ("--prompts", str(prompts), "--output", str(output))
    assert main([*flags(model), *SHORT, *files]) == 1
    assert [len(line["token_ids"]) for line in lines_of(output)][:2] == [4, 4]
    assert capsys.readouterr().err == "error: gone\n"


def test_results_that_are_finished_are_delivered_when_the_engine_fails(model: Path) -> None:
    """Also those that wait for an earlier one."""
    delivered: dict[int, RequestOutput] = {}
    config = EngineConfig(str(model), launcher="thread", max_model_len=2048)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2000, 3)]
    with Engine(config) as engine:
        second: Any = engine._core.start_at

        def fail_later(*arguments: Any) -> Any:
            handle = second(*arguments)

            def end() -> None:
                handle.result()
                engine._core._end(RankFailed("gone"))

            if handle.request_id == 1:
                threading.Thread(target=end).start()
            return handle

        engine._core.start_at = fail_later  # type: ignore[method-assign, assignment]
        with pytest.raises(RankFailed, match="gone"):
            engine.generate(["a", "b"], params, on_output=delivered.__setitem__)
    assert {index: len(made.token_ids) for index, made in delivered.items()} == {1: 3}


@pytest.mark.parametrize("count", [1, 2])
def test_requests_that_fail_cost_the_others_nothing(
    count: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    inject = ";".join(f"rank={rank},step=2,kind=nan" for rank in range(count))
    fail = ["--inject", inject, "--dp-size", "2", "--output", str(output)]
    assert main([*flags(model), *SHORT, *fail]) == 1
    assert len(lines_of(output)) == 6 - count
    expected = r"error: request 0: the model gave NaN or infinite logits for its token \d"
    more = "; 1 more failed" if count == 2 else ""
    assert re.fullmatch(f"{expected}{more}\n", capsys.readouterr().err.splitlines(True)[-1])


@pytest.mark.parametrize(
    "closed",
    ["<&- >&- 2>&-", *(pytest.param(one, marks=pytest.mark.slow) for one in (">&-", "2>&-"))],
)
def test_streams_that_the_caller_closed(closed: str, model: Path, tmp_path: Path) -> None:
    """Files that are opened later do not become stdout, and a traceback loses nothing."""
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "launch.py", *flags(model), *SHORT, "--output", str(output)]
    run = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command],
        cwd=ROOT, capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert len(lines_of(output)) == 6
    written = closed == "2>&-"
    assert run.returncode == (0 if written else 1), "the report could not be printed"
    assert bool(run.stdout) is written
    assert run.stderr == (b"error: stdout: Bad file descriptor\n" if closed == ">&-" else b"")
