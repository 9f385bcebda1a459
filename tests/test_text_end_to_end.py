"""Text through the whole runtime: first spaces, and special tokens that end a request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from dp_runtime import Engine, EngineConfig, RequestOutput, SamplingParams
from dp_runtime.cli.main import main
from dp_runtime.core.request import FinishReason
from tests.reference import Reference
from tests.serving import check_pages_free

VOCAB = 199
PROMPT = [11, 12, 13]
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=12)


@pytest.fixture(scope="module")
def plain(reference_of: Callable[[str], Reference]) -> RequestOutput:
    """What the model continues the prompt with, as tokens."""
    with Engine(EngineConfig(str(reference_of("qwen").path), launcher="thread")) as engine:
        return engine.generate([PROMPT], GREEDY)[0]


@pytest.fixture(scope="module")
def tokenizer(plain: RequestOutput) -> HfTokenizer:
    """Token i is a space and the word w<i>, but the sixth of the output is special."""
    special = plain.token_ids[5]
    vocab = {f"▁w{token:03}": token for token in range(VOCAB) if token != special}
    vocab["<|end|>"] = special
    made = HfTokenizer(models.WordLevel(vocab, unk_token="<|end|>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<|end|>"])
    return made


@pytest.fixture(scope="module")
def model(
    reference_of: Callable[[str], Reference], tokenizer: HfTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    path = tmp_path_factory.mktemp("text") / "model"
    shutil.copytree(reference_of("qwen").path, path)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(EngineConfig(str(model), dp_size=2, launcher="thread")) as one:
        yield one


def streamed(engine: Engine, params: SamplingParams) -> tuple[str, FinishReason | None]:
    deltas = list(engine.stream(PROMPT, params))
    return "".join(delta.text for delta in deltas), deltas[-1].finish_reason


def test_prompt_and_text_are_the_text_of_all_tokens(
    engine: Engine, tokenizer: HfTokenizer, plain: RequestOutput
) -> None:
    (output,) = engine.generate([PROMPT], GREEDY)
    assert output.token_ids == plain.token_ids
    everything = tokenizer.decode([*PROMPT, *output.token_ids])
    assert tokenizer.decode(PROMPT) + output.text == everything
    assert streamed(engine, GREEDY) == (output.text, FinishReason.LENGTH)
    shown = replace(GREEDY, skip_special_tokens=False)
    (output,) = engine.generate([PROMPT], shown)
    everything = tokenizer.decode([*PROMPT, *output.token_ids], skip_special_tokens=False)
    assert tokenizer.decode(PROMPT) + output.text == everything
    assert "<|end|>" in output.text
    assert streamed(engine, shown)[0] == output.text


def test_a_stop_string_with_a_first_space_matches_the_first_token(
    engine: Engine, plain: RequestOutput
) -> None:
    params = replace(GREEDY, stop=[f" w{plain.token_ids[0]:03}"])
    (output,) = engine.generate([PROMPT], params)
    assert (output.text, output.token_ids) == ("", plain.token_ids[:1])
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, params.stop[0])
    assert streamed(engine, params) == ("", FinishReason.STOP)


@pytest.mark.parametrize("before", [0, 2])
def test_a_special_token_is_a_stop_string(
    before: int, engine: Engine, tokenizer: HfTokenizer, plain: RequestOutput
) -> None:
    """Alone, and after the last words before it; they are no part of the text."""
    words = plain.token_ids[5 - before : 5]
    stop = "".join(f" w{token:03}" for token in words) + "<|end|>"
    (output,) = engine.generate([PROMPT], replace(GREEDY, stop=["nowhere", stop]))
    assert output.token_ids == plain.token_ids[:6]
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, stop)
    expected = "".join(f" w{token:03}" for token in plain.token_ids[: 5 - before])
    assert output.text == expected
    assert streamed(engine, replace(GREEDY, stop=stop)) == (expected, FinishReason.STOP)
    shown = replace(GREEDY, stop=stop, skip_special_tokens=False)
    assert engine.generate([PROMPT], shown)[0].text == expected
    check_pages_free(engine)


def test_the_command_line_keeps_the_first_space_and_stops_at_special_tokens(
    model: Path, plain: RequestOutput, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt_token_ids": PROMPT}, {"prompt_token_ids": PROMPT, "stop": ["<|end|>"]}]
    prompts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    flags = ["generate", "--model", str(model), "--launcher", "thread", "--max-tokens", "12"]
    flags += ["--ignore-eos", "--prompts", str(prompts)]
    assert main([*flags, "--output", str(output)]) == 0
    texts = [json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()]
    assert [text[:5] for text in texts] == [f" w{plain.token_ids[0]:03}"] * 2
    assert texts[1] == "".join(f" w{token:03}" for token in plain.token_ids[:5])
    assert main([*flags, "--stop", "<|end|>"]) == 0
    assert f"→{texts[1]}\n" in capsys.readouterr().out
