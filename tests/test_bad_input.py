"""Every mistake is one line that names field and value; the engine serves on, nothing is left."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.cli.jsonl import read_prompts
from dp_runtime.cli.main import main
from dp_runtime.cli.workload import Workload
from dp_runtime.core.request import TokensPrompt
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.workers.leftovers import shared_memory_names, wait_until

MAX_MODEL_LEN = 64
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
GOOD_PROMPTS = ([5, 6, 7], [9] * 20, [11, 3])


@dataclass(frozen=True)
class Place:
    """Where a mistake is made: running engines, a good model directory, and room for files."""

    engine: Engine  # without a tokenizer
    text_engine: Engine
    model: Path
    room: Path


Act = Callable[[Place], object]


def config(**fields: Any) -> Act:
    """Construct a configuration."""
    return lambda place: EngineConfig(**dict[str, Any](model=str(place.model)) | fields)


def start(**fields: Any) -> Act:
    """Start an engine with a configuration that looks right by itself."""
    fields = dict[str, Any](dp_size=2, launcher="thread") | fields

    def act(place: Place) -> None:
        Engine(EngineConfig(**dict[str, Any](model=str(place.model)) | fields)).close()

    return act


def model(change: Callable[[Path], object]) -> Act:
    """Start an engine on a model directory that was changed."""

    def act(place: Place) -> None:
        directory = place.room / "model"
        tiny_copy(place.model, directory)
        change(directory)
        start(model=str(directory))(place)

    return act


def drafts(fields: Callable[[Path], dict[str, Any]]) -> Act:
    """Start an engine that drafts 2 tokens, on a copy of the model with an MTP layer."""

    def act(place: Place) -> None:
        directory = place.room / "model"
        tiny_copy(place.model, directory)
        add_mtp(directory)
        start(model=str(directory), speculative_num_steps=2, **fields(directory))(place)

    return act


def prompt(prompt: Any, **params: Any) -> Act:
    """Submit a prompt."""
    return lambda place: place.engine.submit(prompt, SamplingParams(**params))


def text(prompt: Any, **params: Any) -> Act:
    """Submit a prompt to the engine that has a tokenizer."""
    return lambda place: place.text_engine.submit(prompt, SamplingParams(**params))


def embeds(values: Any, positions: Any) -> Act:
    """Submit a prompt with embeddings."""
    return prompt(TokensPrompt([1, 2, 3], values, positions))


def generate(*arguments: Any, **named: Any) -> Act:
    return lambda place: place.engine.generate(*arguments, **named)


def jsonl(content: str | bytes) -> Act:
    """Read a prompt file."""

    def act(place: Place) -> None:
        path = place.room / "prompts.jsonl"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        read_prompts(path, SamplingParams())

    return act


def tiny_copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def fields(**changed: Any) -> Act:
    """Change fields of config.json; None removes one."""

    def change(directory: Path) -> None:
        path = directory / "config.json"
        values = json.loads(path.read_text()) | changed
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return model(change)


def tensors(change: Callable[[dict[str, Any]], object]) -> Act:
    """Change the tensors of the checkpoint."""

    def rewrite(directory: Path) -> None:
        values = load_file(directory / "model.safetensors")
        change(values)
        save_file(values, directory / "model.safetensors")

    return model(rewrite)


def file(name: str, content: bytes | None) -> Act:
    """Replace a file of the directory, or remove it."""

    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        if content is not None:
            (directory / name).write_bytes(content)

    return model(change)


def truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def index(**file_of: str) -> Callable[[Path], object]:
    """An index of the checkpoint that has some tensors elsewhere."""

    def change(directory: Path) -> None:
        names = load_file(directory / "model.safetensors")
        weight_map = dict.fromkeys(names, "model.safetensors") | file_of
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )

    return change


def other_shard(directory: Path) -> None:
    """The index names a file for a tensor that the file does not have."""
    save_file({"x": load_file(directory / "model.safetensors")[GATE]}, directory / OTHER)
    index(**{GATE: OTHER})(directory)


OTHER = "model-2.safetensors"
EMBED, GATE = "model.embed_tokens.weight", "model.layers.0.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.6.up_proj.weight"  # of rank 1 alone
ROWS = np.zeros((1, 64), np.float32)

CASES: dict[str, tuple[Act, str]] = {
    # What a configuration can have wrong by itself.
    "model empty": (config(model=""), "model: ''"),
    "model a Path": (config(model=Path("/x")), "model: PosixPath('/x')"),
    "dp_size zero": (config(dp_size=0), "dp_size: 0"),
    "dp_size bool": (config(dp_size=True), "dp_size: True"),
    "dp_size text": (config(dp_size="4"), "dp_size: '4'"),
    "padding": (config(padding="max"), "padding: 'max' is not allowed; one of max_len"),
    "launcher": (config(launcher="mpi"), "launcher: 'mpi' is not allowed; one of ray"),
    "routing": (config(routing=None), "routing: None is not allowed; one of round_robin"),
    "moe_sharding": (config(moe_sharding="pp"), "moe_sharding: 'pp'"),
    "dtype": (config(dtype="int8"), "dtype: 'int8' is not allowed; one of auto, float32"),
    "load_format": (config(load_format="gguf"), "load_format: 'gguf'"),
    "attention_backend": (config(attention_backend="fa9"), "attention_backend: 'fa9'"),
    "collective of threads": (
        config(collective="in_process", launcher="local"),
        "collective: 'in_process' is not allowed; auto or shared_memory or peer_to_peer or "
        "torch_distributed with launcher local; or launcher thread with in_process",
    ),
    "collective of processes": (
        config(collective="torch_distributed", launcher="thread"),
        "collective: 'torch_distributed' is not allowed; auto or in_process with launcher thread; "
        "or launcher ray or local with torch_distributed",
    ),
    "collective of GPUs": (
        config(collective="peer_to_peer", device="cpu"),
        "collective: 'peer_to_peer' is not allowed; auto or shared_memory or torch_distributed on "
        "device cpu; peer_to_peer is for GPUs",
    ),
    "ranks_per_gpu": (config(ranks_per_gpu=0), "ranks_per_gpu: 0"),
    "two ranks on a GPU over NCCL": (
        config(device="cuda", collective="torch_distributed", ranks_per_gpu=2),
        "collective: 'torch_distributed' is not allowed; auto or shared_memory or peer_to_peer "
        "with ranks_per_gpu 2; NCCL refuses two ranks on one GPU",
    ),
    "page_size": (config(page_size=0), "page_size: 0"),
    "num_pages": (config(num_pages=1), "num_pages: 1"),
    "max_num_requests": (
        config(max_num_requests=9, max_num_tokens=8), "max_num_requests: 9",
    ),
    "kv_memory_fraction": (config(kv_memory_fraction=1.5), "kv_memory_fraction: 1.5"),
    "max_step_ms": (config(max_step_ms=0), "max_step_ms: 0"),
    "max_step_ms below 0": (config(max_step_ms=-5.0), "max_step_ms: -5.0"),
    "step_timeout_s": (config(step_timeout_s=float("nan")), "step_timeout_s: nan"),
    "start_timeout_s": (config(start_timeout_s=-1), "start_timeout_s: -1"),
    "seed": (config(seed=2**63), f"seed: {2**63}"),
    "overlap": (config(overlap=1), "overlap: 1"),
    "ray_address": (config(ray_address=6379), "ray_address: 6379"),
    "too many steps": (config(speculative_num_steps=8), "speculative_num_steps: 8"),
    "steps below none": (config(speculative_num_steps=-1), "speculative_num_steps: -1"),
    "steps a bool": (config(speculative_num_steps=True), "speculative_num_steps: True"),
    "steps a fraction": (config(speculative_num_steps=2.0), "speculative_num_steps: 2.0"),
    "draft model without steps": (
        config(speculative_draft_model="/x"), "speculative_draft_model: '/x' is not allowed",
    ),
    "draft model empty": (
        config(speculative_num_steps=1, speculative_draft_model=""), "speculative_draft_model: ''",
    ),
    "draft vocabulary without steps": (
        config(speculative_draft_vocab=9), "speculative_draft_vocab: 9 is not allowed",
    ),
    "draft vocabulary of nothing": (
        config(speculative_num_steps=1, speculative_draft_vocab=0), "speculative_draft_vocab: 0",
    ),
    "adaptive without steps": (
        config(speculative_adaptive=True), "speculative_adaptive: True is not allowed",
    ),
    "adaptive a number": (
        config(speculative_num_steps=1, speculative_adaptive=1), "speculative_adaptive: 1 is not",
    ),
    "forced without steps": (
        config(speculative_forced_tokens=1.0), "speculative_forced_tokens: 1.0 is not allowed",
    ),
    "forced above all": (
        config(speculative_num_steps=3, speculative_forced_tokens=4.5),
        "speculative_forced_tokens: 4.5 is not allowed; None or 1..4",
    ),
    "forced NaN": (
        config(speculative_num_steps=3, speculative_forced_tokens=float("nan")),
        "speculative_forced_tokens: nan",
    ),
    "verifications above the budget": (
        config(speculative_num_steps=3, max_num_requests=17, max_num_tokens=64),
        "max_num_requests: 17 is not allowed; at most 16",
    ),
    "no verification in the budget": (
        config(speculative_num_steps=3, max_num_tokens=3),
        "max_num_tokens: 3 is not allowed; at least 4: a decoding request feeds 4 to a step",
    ),
    # What only the machine or the model tells.
    "device": (start(device="cuda"), "device: 'cuda'"),
    "backend for the device": (
        start(attention_backend="trtllm", device="cpu"), "attention_backend: 'trtllm'",
    ),
    "graphs on CPU": (
        start(cuda_graphs=True, device="cpu"),
        "cuda_graphs: True is not allowed; None or False, as device cpu has none",
    ),
    "num_pages for the length": (
        start(num_pages=4, max_model_len=1000), "num_pages: 4 is not allowed; at least 17",
    ),
    "max_model_len": (start(max_model_len=4096), "max_model_len: 4096"),
    "model without a draft": (
        start(speculative_num_steps=2), "speculative_draft_model: None is not allowed; name",
    ),
    "draft model missing": (
        start(speculative_num_steps=2, speculative_draft_model="/nowhere"), "'/nowhere'",
    ),
    "draft model no head": (
        drafts(lambda directory: {"speculative_draft_model": str(directory)}),
        "speculative_draft_model: config.json: architectures: ",
    ),
    "num_pages for drafts": (
        drafts(lambda directory: {"num_pages": 17, "max_model_len": 1024}),
        "at least 18: max_model_len 1024 and 2 drafts",
    ),
    "memory": (start(kv_memory_fraction=1e-9), "kv_memory_fraction: 1e-09"),
    "model missing": (start(model="/nowhere"), "model: '/nowhere'"),
    "config.json missing": (file("config.json", None), "a directory with a config.json"),
    "config.json broken": (file("config.json", b"{'a': 1}"), "config.json: not valid JSON"),
    "config.json a list": (file("config.json", b"[]"), "config.json: 'list'"),
    "architecture": (
        fields(architectures=["GPT2LMHeadModel"]), "architectures: ['GPT2LMHeadModel']",
    ),
    "model_type": (fields(model_type="gpt2"), "model_type: 'gpt2'"),
    "field missing": (fields(hidden_size=None), "hidden_size: None"),
    "field of a wrong type": (fields(num_hidden_layers="two"), "num_hidden_layers: 'two'"),
    "field not supported": (fields(hidden_act="gelu"), "hidden_act: 'gelu'"),
    "field that changes the model": (fields(logit_scale=0.5), "logit_scale: 0.5 is not allowed"),
    "layers without end": (fields(num_hidden_layers=10**7), "num_hidden_layers: 10000000"),
    "experts without end": (
        fields(num_experts=10**9, num_local_experts=None), "num_experts: 1000000000",
    ),
    "vocabulary beyond int64": (fields(vocab_size=2**63), "vocab_size: 9223372036854775808"),
    "config nested deeply": (
        file("config.json", b"[" * 100_000), "config.json: not valid JSON: nested too deeply",
    ),
    "heads": (fields(num_key_value_heads=3), "num_key_value_heads: 3"),
    "generation_config broken": (
        file("generation_config.json", b"{"), "generation_config.json: not valid JSON",
    ),
    "tokenizer broken": (file("tokenizer.json", b"{}"), "tokenizer.json: not a tokenizer"),
    "weights missing": (file("model.safetensors", None), "a directory with model.safetensors"),
    "weights no safetensors": (
        file("model.safetensors", b"not a checkpoint"), "model.safetensors: not a readable",
    ),
    "weights truncated": (model(truncated), "model.safetensors: not a readable"),
    "index broken": (
        file("model.safetensors.index.json", b'{"weight_map": 3}'), "index.json: not an index",
    ),
    "shard missing": (model(index(**{EMBED: OTHER})), f"index.json: {OTHER!r}"),
    "tensor missing": (tensors(lambda t: t.pop(GATE)), f"tensor {GATE} is missing"),
    "tensor missing on one rank": (
        tensors(lambda t: t.pop(EXPERT)), "rank 1: ",
    ),
    "tensor not in its shard": (model(other_shard), f"model-2.safetensors: {GATE}: "),
    "tensor of a wrong shape": (
        tensors(lambda t: t.update({GATE: t[GATE][:5].clone()})), f"{GATE}: shape: (5, 64)",
    ),
    "tensor of a wrong type": (
        tensors(lambda t: t.update({GATE: t[GATE].int()})), f"{GATE}: dtype: 'I32'",
    ),
    # Requests.
    "prompt too long": (
        prompt([1] * 64),
        "prompt: '64 tokens' is not allowed; this model's maximum context length is 64 tokens",
    ),
    "token out of vocabulary": (prompt([1, 199]), "prompt: 199 is not allowed; token ids"),
    "token negative": (prompt([-1]), "prompt: -1"),
    "token a float": (prompt([1.0]), "prompt: '1.0'"),
    "token a bool": (prompt([True]), "prompt: 'True'"),
    "prompt without tokens": (prompt([]), "prompt: '' is not allowed; at least one token"),
    "prompt empty text": (text(""), "prompt: ''"),
    "prompt without a tokenizer": (prompt("words"), "prompt: 'words'"),
    "prompt a number": (prompt(7), "prompt: '7'"),
    "prompt not encodable": (text("a\ud800"), "prompt: 'a\\ud800'"),
    "temperature NaN": (prompt([1], temperature=float("nan")), "temperature: nan"),
    "temperature negative": (prompt([1], temperature=-0.1), "temperature: -0.1"),
    "max_tokens": (prompt([1], max_tokens=-1), "max_tokens: -1"),
    "min_tokens": (prompt([1], min_tokens=20), "min_tokens: 20"),
    "top_p": (prompt([1], top_p=0), "top_p: 0"),
    "top_k": (prompt([1], top_k=-2), "top_k: -2"),
    "logprobs": (prompt([1], logprobs=1000), "logprobs: 1000"),
    "stop without a tokenizer": (prompt([1], stop="x"), "stop: 'x'"),
    "bad_words without a tokenizer": (
        prompt([1], bad_words=["x"]),
        "bad_words: ('x',) is not allowed; none: the model's directory has no tokenizer.json",
    ),
    "allowed_token_ids": (prompt([1], allowed_token_ids=[500]), "allowed_token_ids: [500]"),
    "stop empty": (text("a", stop=[""]), "stop: ['']"),
    "logit_bias out of vocabulary": (prompt([1], logit_bias={199: 1.0}), "logit_bias: {199: 1.0}"),
    "logit_bias NaN": (prompt([1], logit_bias={1: float("nan")}), "logit_bias: {1: nan}"),
    "stop_token_ids": (prompt([1], stop_token_ids=[500]), "stop_token_ids: [500]"),
    "params": (generate([[1]], "greedy"), "params: 'greedy'"),
    "params of another type": (generate([[1]], [{}]), "prompts[0]: params: {}"),
    "params of a wrong length": (generate([[1], [2]], [GREEDY]), "params: "),
    "prompts a text": (generate("Once"), "prompts: 'Once'"),
    "prompts a number": (generate(3), "prompts: 3"),
    "one of many": (generate([[1], [2], [400]]), "prompts[2]: prompt: 400"),
    "dp_rank": (generate([[1]], dp_ranks=[2]), "prompts[0]: dp_rank: 2"),
    "dp_rank a text": (generate([[1]], dp_ranks=["1"]), "prompts[0]: dp_rank: '1'"),
    "dp_ranks of a wrong length": (generate([[1]], dp_ranks=[0, 1]), "dp_ranks: "),
    "embeds of a wrong shape": (embeds(ROWS[:, :5], [0]), "prompt_embeds: (1, 5)"),
    "embeds NaN": (embeds(ROWS * np.nan, [0]), "prompt_embeds: 'NaN or inf'"),
    "embeds no numbers": (embeds([["a"] * 64], [0]), "prompt_embeds: "),
    "embeds ragged": (embeds([[1.0], [1.0, 2.0]], [0, 1]), "prompt_embeds: "),
    "embeds outside": (embeds(ROWS, [3]), "embed_positions: [3]"),
    "embeds twice": (embeds(np.zeros((2, 64)), [1, 1]), "embed_positions: [1, 1]"),
    "embeds between": (embeds(ROWS, [0.5]), "embed_positions: [0.5]"),
    "positions without embeds": (embeds(None, [0]), "embed_positions: [0]"),
    # Prompt files, workloads and the command line.
    "line no JSON": (jsonl('{"prompt": "a"}\n{"prompt": \n'), "prompts.jsonl:2: not JSON"),
    "line no object": (jsonl("[1]"), "prompts.jsonl:1: line: [1]"),
    "line with an unknown field": (jsonl('{"prompt": "a", "tempo": 1}'), "1: tempo: 1"),
    "line with two prompts": (
        jsonl('{"prompt": "a", "prompt_token_ids": [1]}'), "either prompt or prompt_token_ids",
    ),
    "line without a prompt": (jsonl('{"max_tokens": 1}'), "either prompt or prompt_token_ids"),
    "line with a wrong prompt": (jsonl('{"prompt": [1]}'), "1: prompt: [1]"),
    "line with wrong tokens": (jsonl('{"prompt_token_ids": "1"}'), "1: prompt_token_ids: '1'"),
    "line with a wrong field": (jsonl('{"prompt": "a", "top_k": "5"}'), "1: top_k: '5'"),
    "line with a wrong rank": (jsonl('{"prompt": "a", "dp_rank": "x"}'), "1: dp_rank: 'x'"),
    "file empty": (jsonl("\n \n"), "a file with at least one line"),
    "file not UTF-8": (jsonl(b'{"prompt": "\xff"}'), "prompts.jsonl: not UTF-8"),
    "file missing": (
        lambda place: read_prompts(place.room / "none.jsonl", GREEDY), "none.jsonl'",
    ),
    "workload empty": (lambda place: Workload(num_requests=0), "num_requests: 0"),
    "workload lengths": (lambda place: Workload(input_len=(9, 3)), "input_len: (9, 3)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engines(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, Engine]]:
    with_text = tmp_path_factory.mktemp("text") / "model"
    tiny_copy(directory, with_text)
    letters = Tokenizer(models.BPE({letter: at for at, letter in enumerate("_abcdefgh")}, []))
    letters.pre_tokenizer = pre_tokenizers.Metaspace("_")
    letters.decoder = decoders.Metaspace("_")
    letters.save(str(with_text / "tokenizer.json"))

    def engine(path: Path) -> Engine:
        fields: dict[str, Any] = {"max_num_requests": 4, "max_model_len": MAX_MODEL_LEN}
        return Engine(EngineConfig(str(path), dp_size=2, launcher="thread", **fields))

    with engine(directory) as plain, engine(with_text) as text_engine:
        yield plain, text_engine


@pytest.fixture(scope="module")
def good(engines: tuple[Engine, Engine]) -> list[list[tuple[int, ...]]]:
    """What the engines say before any mistake."""
    return [tokens(engine) for engine in engines]


def tokens(engine: Engine) -> list[tuple[int, ...]]:
    return [output.token_ids for output in engine.generate(GOOD_PROMPTS, GREEDY)]


@pytest.mark.parametrize("kind", CASES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    kind: str, engines: tuple[Engine, Engine], good: list[Any], directory: Path, tmp_path: Path
) -> None:
    act, message = CASES[kind]
    before = left_overs()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        act(Place(*engines, directory, tmp_path))
    assert "\n" not in str(error.value)
    assert len(str(error.value).replace(str(tmp_path), "")) < 500
    wait_until(lambda: left_overs() == before, "nothing new is left")
    assert [tokens(engine) for engine in engines] == good
    wait_until(lambda: all(map(no_page_in_use, engines)), "all pages are free again")


def left_overs() -> tuple[set[int], list[str], set[Path]]:
    """Child processes, threads of ranks, and shared memory."""
    ranks = sorted(t.name for t in threading.enumerate() if t.name.startswith("dp-rank"))
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    return children, ranks, shared_memory_names()


def no_page_in_use(engine: Engine) -> bool:
    return all(
        rank.free_pages == rank.num_pages - 1 and not rank.num_running and not rank.num_queued
        for rank in engine.health()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["generate", "--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["generate", "--dp-size", "two"], "--dp-size: invalid int value: 'two'"),
        (["bench", "--input-len", "5"], "--input-len: expected 2 arguments"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_the_command_line_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dp-size", "0"], "dp_size: 0"),
        (["--temperature", "nan"], "temperature: nan"),
        (["--prompts", "/nowhere.jsonl"], "prompts: '/nowhere.jsonl'"),
        (["--model", "/nowhere"], "model: '/nowhere'"),
        (["--prompt", ""], "prompts[0]: prompt: ''"),
        (["--prompt", "a", "--prompts", "x"], "prompt: ['a'] is not allowed; nothing beside"),
        (["--output", "/proc/out.jsonl"], "output: '/proc/out.jsonl' is not allowed; No such file"),
    ],
)
def test_the_command_line_reports_one_line(
    arguments: list[str], message: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["generate", "--launcher", "thread", "--model", str(directory)]
    assert main([*start, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {message}")
    assert shown.err.count("\n") == 1


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 40
