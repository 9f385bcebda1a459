"""Sampled tokens and the ends of requests, through the whole runtime over threads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from dp_runtime import Engine, EngineConfig, RequestOutput, SamplingParams
from dp_runtime.core.request import FinishReason
from tests.draws import check_drawn
from tests.product_cases import random_prompt
from tests.reference import Reference, Tokens
from tests.serving import check_pages_free

VOCAB = 199
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=24)

ReferenceOf = Callable[[str], Reference]


def threads(path: Path, dp_size: int = 1, **others: Any) -> Engine:
    values = dict[str, Any](launcher="thread", max_model_len=128, page_size=16, max_num_requests=8)
    return Engine(EngineConfig(str(path), dp_size=dp_size, **(values | others)))


PENALTIES = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3}
BIAS = {5: 6.0, 17: 5.0, 60: -50.0, 111: 1e9}
MIX: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"temperature": 2.5, "top_k": 20},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.9, **PENALTIES},
    {"temperature": 0.0, **PENALTIES},
    {"temperature": 0.0, "repetition_penalty": 0.6, "presence_penalty": -1.0},
    {"logit_bias": {5: 6.0, 17: 5.0, 60: -50.0}},
    {"temperature": 0.0, "logit_bias": {0: 30.0}, "min_tokens": 4, "ignore_eos": False},
    {"logit_bias": {7: 8.0}, "stop_token_ids": (7, 8), "min_tokens": 6},
    {"top_p": 0.8, "min_p": 0.05, "logit_bias": {3: 4.0}, "stop_token_ids": (3,), **PENALTIES},
    {"temperature": 0.7, "logprobs": 2, "prompt_logprobs": 0},
    {"temperature": 1e-3},
    {"allowed_token_ids": range(0, 199, 7), "logit_bias": {5: 50.0}, **PENALTIES},
]
PARAMS = [
    SamplingParams(**{"max_tokens": 20, "ignore_eos": True, "seed": 1000 + index} | fields)
    for index, fields in enumerate(MIX)
]
LENGTHS = (55, 50, 1, 7, 16, 33, 2, 20, 12, 40, 3, 9, 17, 64, 5, 30, 11)
PROMPTS = [random_prompt(length, "sampled") for length in LENGTHS]
RUNS: dict[str, dict[str, Any]] = {
    "dp1": {"dp_size": 1},
    "dp1 overlap, one request a step": {"dp_size": 1, "overlap": True, "max_num_requests": 1},
    "dp4": {"dp_size": 4},
    "dp4 overlap": {"dp_size": 4, "overlap": True, "poison_padding": True},
    "dp4 tp, small budget": {"dp_size": 4, "moe_sharding": "tp", "max_num_tokens": 8},
    "dp2 preempted": {"dp_size": 2, "num_pages": 9, "padding": "ragged"},
    "dp3 preempted overlap": {"dp_size": 3, "num_pages": 9, "overlap": True, "padding": "auto"},
}


@pytest.mark.parametrize("checkpoint", ["qwen", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_seeded_tokens_depend_on_the_request_alone(
    checkpoint: str, reference_of: ReferenceOf
) -> None:
    """Each run is compared with a draw from the oracle's logits, so all are with each other."""
    reference = reference_of(checkpoint)
    found: dict[str, list[Tokens]] = {}
    for name, config in RUNS.items():
        order = list(range(len(PROMPTS)))
        if config["dp_size"] == 4:
            order.reverse()
        with threads(reference.path, **config) as engine:
            prompts = [PROMPTS[i] for i in order]
            outputs = engine.generate(prompts, [PARAMS[i] for i in order])
            outputs = [outputs[order.index(i)] for i in range(len(order))]
            assert engine.report().preemptions > 0 or "preempted" not in name
            check_pages_free(engine)
        check_drawn(reference, outputs, PARAMS)
        found[name] = [output.token_ids for output in outputs]
    for name, tokens in found.items():
        same = sum(a == b for a, b in zip(tokens, found["dp1"]))
        assert same >= len(PROMPTS) - 1, f"{name}: more than one near-tie is no chance"
    assert len({*found["dp1"]}) == len(PROMPTS)


def test_draws_of_the_mix_use_what_they_test(reference_of: ReferenceOf) -> None:
    """Each set of parameters changes tokens: without them the same seed gives others."""
    reference = reference_of("qwen")
    plain = SamplingParams(max_tokens=20, ignore_eos=True)
    with threads(reference.path) as engine:
        changed = engine.generate([PROMPTS[0]] * len(PARAMS), PARAMS)
        bare = [replace(plain, seed=one.seed, temperature=one.temperature) for one in PARAMS]
        without = engine.generate([PROMPTS[0]] * len(PARAMS), bare)
    only_seed = {"temperature", "logprobs", "prompt_logprobs"}
    for fields, one, other in zip(MIX, changed, without):
        assert (one.token_ids == other.token_ids) == (fields.keys() <= only_seed), fields


def test_a_request_without_a_seed_repeats_with_its_engine(reference_of: ReferenceOf) -> None:
    path = reference_of("qwen").path
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    runs = []
    for dp_size, seed in ((1, 3), (4, 3), (1, 4)):
        with threads(path, dp_size, seed=seed) as engine:
            outputs = engine.generate([PROMPTS[4]] * 6, params)
            runs.append([output.token_ids for output in outputs])
    assert runs[0] == runs[1] != runs[2]
    assert len({*runs[0]}) == 6


@pytest.fixture(scope="module")
def greedy(reference_of: ReferenceOf) -> list[RequestOutput]:
    """What some prompts get when nothing ends or disturbs them."""
    with threads(reference_of("qwen").path) as engine:
        return engine.generate(PROMPTS[:6], GREEDY)


@pytest.fixture(scope="module")
def with_text(reference_of: ReferenceOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a tokenizer: token i is a space and the word w<i>."""
    path = tmp_path_factory.mktemp("text") / "model"
    shutil.copytree(reference_of("qwen").path, path)
    vocab = {f"▁w{token:03}": token for token in range(VOCAB)}
    tokenizer = HfTokenizer(models.WordLevel(vocab, unk_token="▁w000"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("overlap", [False, True])
def test_stop_strings(overlap: bool, with_text: Path, greedy: list[RequestOutput]) -> None:
    """A stop string that spans two tokens ends its request alone."""
    ids = greedy[0].token_ids
    stop = f"{ids[9]:03} w{ids[10]:03}"
    first = next(i for i in range(1, len(ids)) if f"{ids[i - 1]:03} w{ids[i]:03}" == stop)
    params = [replace(GREEDY, stop=["nowhere", stop]), *[GREEDY] * 5]
    with threads(with_text, 3, overlap=overlap) as engine:
        outputs = engine.generate(PROMPTS[:6], params)
        text = "".join(f" w{token:03}" for token in ids)  # it continues a prompt
        assert outputs[0].text == text[: text.index(stop)]
        assert outputs[0].token_ids == ids[: first + 1]
        assert (outputs[0].finish_reason, outputs[0].stop_reason) == (FinishReason.STOP, stop)
        assert [o.token_ids for o in outputs[1:]] == [o.token_ids for o in greedy[1:]]
        streamed = list(engine.stream(text[1:], replace(GREEDY, max_tokens=5)))
        check_pages_free(engine)
    assert sum(len(delta.token_ids) for delta in streamed) == 5
    assert streamed[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("overlap", [False, True])
def test_stop_token_ids(
    overlap: bool, reference_of: ReferenceOf, greedy: list[RequestOutput]
) -> None:
    ends = [output.token_ids[4 + index] for index, output in enumerate(greedy)]
    params = [replace(GREEDY, stop_token_ids=(198, end)) for end in ends]
    with threads(reference_of("qwen").path, 2, overlap=overlap) as engine:
        outputs = engine.generate(PROMPTS[:6], params)
        check_pages_free(engine)
    for output, plain, end in zip(outputs, greedy, ends):
        assert output.token_ids == plain.token_ids[: plain.token_ids.index(end) + 1]
        assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, end)


def test_eos_of_the_generation_config(
    reference_of: ReferenceOf, tmp_path: Path, greedy: list[RequestOutput]
) -> None:
    """The ids of generation_config.json hold, not those of config.json."""
    path = tmp_path / "model"
    shutil.copytree(reference_of("qwen").path, path)
    ends = [greedy[0].token_ids[7], greedy[1].token_ids[3]]
    for name, ids in (("config", greedy[0].token_ids[0]), ("generation_config", ends)):
        file = path / f"{name}.json"
        fields = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(fields | {"eos_token_id": ids}))
    with threads(path, 2) as engine:
        assert set(engine.model.eos_token_ids) == set(ends)
        outputs = engine.generate(PROMPTS[:2], replace(GREEDY, ignore_eos=False))
        ignoring = engine.generate(PROMPTS[:2], GREEDY)
    for output, plain, unstopped in zip(outputs, greedy, ignoring):
        last = min(plain.token_ids.index(end) for end in ends if end in plain.token_ids)
        assert output.token_ids == plain.token_ids[: last + 1]
        assert output.finish_reason is FinishReason.STOP
        assert output.stop_reason in ends
        assert unstopped.token_ids == plain.token_ids


@pytest.mark.parametrize("overlap", [False, True])
def test_max_model_len_ends_a_request(
    overlap: bool, reference_of: ReferenceOf, greedy: list[RequestOutput]
) -> None:
    endless = replace(GREEDY, max_tokens=10**9)
    with threads(reference_of("qwen").path, 2, max_model_len=60, overlap=overlap) as engine:
        outputs = engine.generate([*PROMPTS[:6], random_prompt(59, "full")], endless)
        check_pages_free(engine)
    for output in outputs:
        assert len(output.prompt_token_ids) + len(output.token_ids) == 60
        assert output.finish_reason is FinishReason.LENGTH
    for output, plain in zip(outputs, greedy):
        shared = min(len(output.token_ids), len(plain.token_ids))
        assert output.token_ids[:shared] == plain.token_ids[:shared]


@pytest.mark.parametrize("overlap", [False, True])
def test_abort_leaves_others_unchanged(
    overlap: bool, reference_of: ReferenceOf, greedy: list[RequestOutput]
) -> None:
    """Some are aborted after a few tokens, one is left by its stream, few pages are fought for."""
    config = {"num_pages": 9, "overlap": overlap}
    endless = SamplingParams(max_tokens=10**6, seed=1, ignore_eos=True)
    with threads(reference_of("qwen").path, 2, **config) as engine:
        doomed = [engine.submit(PROMPTS[i], endless, i % 2) for i in range(6)]
        kept = [engine.submit(PROMPTS[i], GREEDY, i % 2) for i in range(6)]
        for handle in doomed:
            if not handle.done:
                next(iter(handle))
            handle.abort()
            handle.abort()
        for delta in engine.stream(PROMPTS[6], endless, 1):
            if delta.token_ids:
                break
        outputs = [handle.result(60) for handle in kept]
        ended = [handle.result(60) for handle in doomed]
        check_pages_free(engine)
        assert engine.report().requests == 13
    assert [output.token_ids for output in outputs] == [output.token_ids for output in greedy]
    assert {output.finish_reason for output in ended} <= {FinishReason.ABORT, FinishReason.LENGTH}
    assert FinishReason.ABORT in {output.finish_reason for output in ended}
