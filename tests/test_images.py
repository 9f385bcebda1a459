"""Prompts with images, served over ranks, against transformers in float32.

Numbers in names are those of the groups of mistakes that other runtimes made with such models.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dp_runtime import AsyncEngine, Engine, EngineConfig, ImagePrompt, SamplingParams
from dp_runtime.cli.main import main
from dp_runtime.metrics.chrome_trace import chrome_trace
from dp_runtime.startup.inspection import describe
from dp_runtime.startup.rank_plan import plan_rank
from tests.hybrid_checkpoints import (
    IMAGE_TOKEN,
    VISION,
    add_mtp,
    agree_in_part,
    hybrid_checkpoint,
)
from tests.image_checkpoints import ImageReference, Pictured, picture, tokenizer_of_letters
from tests.product_cases import random_prompt
from tests.serving import check_pages_free, loops_of
from tests.traces import check_trace

Fields = dict[str, Any]
START, END = [188], [189]
SCORED = SamplingParams(
    temperature=0.0, ignore_eos=True, max_tokens=6, logprobs=2, prompt_logprobs=1
)
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=6)
CAT, DOG = picture(3, 5), picture(5, 2, seed=1)


def text(length: int, seed: str = "images") -> list[int]:
    return [token for token in random_prompt(length, seed) if token != IMAGE_TOKEN]


ONE = Pictured.of(text(4), START, CAT, END, text(6))
ADJACENT = Pictured.of(text(3), START, CAT, END, START, DOG, END, text(2))
TOUCHING = Pictured.of(CAT, DOG, picture(1, 1), CAT, text(5))  # with no token between, or before
EACH = [(text(n, f"{n}"), picture(1 + n % 4, 2, n)) for n in range(10)]
TEN = Pictured.of(*(part for both in EACH for part in both), text(3))
LARGE = Pictured.of(text(7), START, picture(8, 8), END, text(1))
PLAIN = Pictured.of(text(40))
SHORT = Pictured.of(START, picture(1, 2), END, text(2))
ALL = (LARGE, PLAIN, SHORT, ONE, ADJACENT, TOUCHING, TEN)  # the first three fill few pages


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ImageReference:
    layers: Fields = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    path = hybrid_checkpoint(tmp_path_factory.mktemp("images"), VISION, **layers)
    tokenizer_of_letters().save(str(path / "tokenizer.json"))
    return ImageReference(agree_in_part(add_mtp(path)))


@pytest.fixture(scope="module")
def attending(tmp_path_factory: pytest.TempPathFactory) -> ImageReference:
    """A model without recurrent layers, whose pages are shared."""
    layers: Fields = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    path = hybrid_checkpoint(tmp_path_factory.mktemp("attending"), VISION, **layers)
    return ImageReference(agree_in_part(add_mtp(path)))


def engine_of(path: Path, **fields: Any) -> Engine:
    given: dict[str, Any] = {
        "launcher": "thread", "device": "cpu", "max_model_len": 112, "page_size": 8,
        "max_num_requests": 4, "max_num_tokens": 64, "poison_padding": True,
    }  # fmt: skip
    return Engine(EngineConfig(str(path), **given | fields))


def check_served(
    engine: Engine,
    reference: ImageReference,
    pictured: Sequence[Pictured] = ALL,
    params: SamplingParams = SCORED,
) -> None:
    ranks = [index % engine.config.dp_size for index in range(len(pictured))]
    outputs = engine.generate([one.prompt for one in pictured], params, ranks)
    for one, output in zip(pictured, outputs, strict=True):
        reference.check(one, output)
    check_pages_free(engine)


FEW_PAGES: Fields = {"num_pages": 17, "max_num_requests": 6}
DRAFTS: Fields = {"speculative_num_steps": 3}
CASES: dict[str, Fields] = {
    "one rank, few pages, a cache of two images": FEW_PAGES | {"image_cache_tokens": 128},
    "chunks cut images": {"max_num_tokens": 7, "dp_size": 2, "overlap": True},
    "drafts": DRAFTS | {"dp_size": 4, "overlap": True},
    "drafts, chunks cut images": DRAFTS | FEW_PAGES | {"max_num_tokens": 24},
}  # fmt: skip
MORE: dict[str, Fields] = {
    "tp, a budget": {"dp_size": 2, "moe_sharding": "tp", "padding": "ragged", "max_step_ms": 0.5},
    "many chunks": {"max_num_tokens": 5, "dp_size": 3},
    "overlap": {"dp_size": 4, "overlap": True, "max_num_tokens": 23},
    "chunks, few pages": FEW_PAGES | {"max_num_tokens": 11, "overlap": True},
    "drafts, no overlap": DRAFTS | {"dp_size": 2, "max_num_tokens": 30, "image_cache_tokens": 128},
    "adaptive": DRAFTS | {"speculative_adaptive": True, "dp_size": 3, "overlap": True},
    "most drafts": {"speculative_num_steps": 7, "dp_size": 4, "max_num_tokens": 37},
    "drafts, few pages, a budget": DRAFTS | FEW_PAGES | {"max_step_ms": 0.5, "overlap": True},
    "processes": DRAFTS | {"launcher": "local", "dp_size": 2, "torch_threads": 1},
}  # fmt: skip


def check_case(reference: ImageReference, fields: Fields, times: int = 1) -> None:
    with engine_of(reference.path, **fields) as engine:
        for _ in range(times):  # later ones with what is left in the caches
            check_served(engine, reference)
        report = engine.report()
        assert (report.drafts_accepted > 0) == ("speculative_num_steps" in fields)
        assert report.preemptions > 0 or "num_pages" not in fields


@pytest.mark.parametrize("case", CASES)
def test_images_beside_text_19_32_33_35(case: str, reference: ImageReference) -> None:
    check_case(reference, CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_images_in_many_ways(case: str, reference: ImageReference) -> None:
    check_case(reference, MORE[case], times=2)


def encoded_by(engine: Engine) -> list[int]:
    """Images that each rank has encoded."""
    counts = [0] * engine.config.dp_size
    for step in engine.step_trace():
        assert (step.encode_s > 0) == (step.num_images > 0)
        counts[step.dp_rank] += step.num_images
    return counts


def test_an_image_is_encoded_once_while_others_go_on_as_ever(reference: ImageReference) -> None:
    """Only by ranks whose requests have it; ranks with text alone make tokens in the same steps."""
    prompts = [PLAIN, ADJACENT, ONE]  # the first comes first, and makes tokens for long
    params = [replace(GREEDY, max_tokens=60), GREEDY, GREEDY]
    with engine_of(reference.path, dp_size=2) as engine:
        outputs = engine.generate([one.prompt for one in prompts], params, [1, 0, 0])
        assert encoded_by(engine) == [2, 0]
        trace = engine.step_trace()
        text_of = "".join(chrome_trace(trace, engine.health()))
        names = {event["name"] for event in check_trace(text_of)}
        assert {"encode", "target (eager)"} <= names
        encoding = {step.step_id for step in trace if step.num_images}
        made = {step.step_id for step in trace if step.dp_rank == 1 and step.output_tokens}
        assert encoding & made
        engine.generate([TOUCHING.prompt], GREEDY, [0])
        assert encoded_by(engine) == [3, 0]
    for one, output in zip(prompts, outputs, strict=True):
        reference.check(one, output)


@pytest.mark.parametrize("drafts", [pytest.param({}, marks=pytest.mark.slow), DRAFTS])
def test_a_lost_rank_takes_no_image_with_it_36(drafts: Fields, reference: ImageReference) -> None:
    """Its requests, and the survivors', begin anew or go on; what was to be encoded is."""
    inject = "rank=1,step=3,kind=raise;rank=0,step=4,kind=raise,epoch=1"
    fields: Fields = {"dp_size": 2, "max_num_tokens": 24, "inject": inject, "overlap": True}
    with engine_of(reference.path, **fields | drafts) as engine:
        check_served(engine, reference, (ONE, PLAIN, TOUCHING, LARGE), GREEDY)
        assert {rank.epoch for rank in engine.health()} == {2}


@pytest.mark.parametrize("drafts", [pytest.param({}, marks=pytest.mark.slow), DRAFTS])
def test_prefixes_are_shared_by_images_not_by_their_tokens_36(
    drafts: Fields, attending: ImageReference
) -> None:
    """Other pixels of the same shape share what lies before them, and nothing behind."""
    head, tail = text(20), text(20, "tail")
    same = [Pictured.of(head, picture(3, 5, seed), tail) for seed in (1, 2, 1)]
    with engine_of(attending.path, max_num_requests=1, **drafts) as engine:
        found = [engine.generate([one.prompt], GREEDY)[0] for one in same]
    for one, output in zip(same, found, strict=True):
        attending.check(one, output)
    assert [output.num_cached_tokens for output in found] == [0, 16, 48]


def test_an_async_engine_takes_them_too(reference: ImageReference) -> None:
    async def serve() -> None:
        config = EngineConfig(str(reference.path), launcher="thread", max_model_len=112)
        async with AsyncEngine(config) as engine:
            (output,) = await engine.generate([ONE.prompt], SCORED)
            reference.check(ONE, output)
            new = [delta async for delta in engine.stream(ONE.prompt, GREEDY)]
            assert tuple(token for delta in new for token in delta.token_ids) == output.token_ids

    asyncio.run(serve())


def test_requests_without_images_pay_nothing(reference: ImageReference) -> None:
    """No three positions, and nothing that stands for a token: what they launch is as it was."""
    with engine_of(reference.path) as engine:
        (loop,) = loops_of(engine)
        batches = []
        launch = loop.launch

        def watched(scheduled: Any, *others: Any) -> Any:
            batches.append(scheduled.target)
            return launch(scheduled, *others)

        loop.launch = watched  # type: ignore[assignment]
        engine.generate([PLAIN.short], GREEDY)
        assert {batch.rope_positions.shape for batch in batches} == {(3, 0)}
        assert all(batch.rotary_positions is batch.positions for batch in batches)
        engine.generate([ONE.prompt], GREEDY)
        with_images = batches[-GREEDY.known_max_tokens :]
        assert {batch.rope_positions.shape[1] for batch in with_images} == {len(ONE.tokens), 1}
        assert [batch.has_embeds for batch in with_images] == [True] + [False] * 5


NO_LIST: Any = CAT
BAD: dict[str, tuple[Any, str]] = {
    "no image": (ImagePrompt([1, IMAGE_TOKEN], []), ""),
    "too few": (ImagePrompt([IMAGE_TOKEN, 1, IMAGE_TOKEN], [CAT]),
                "images: 1 is not allowed; 2: as often as token 190, which stands for an image"),
    "too many": (ImagePrompt([1, 2], [CAT]), "images: 1 is not allowed; 0: as often"),
    "no list": (ImagePrompt([IMAGE_TOKEN], NO_LIST), "images: .* is not allowed; a list of images"),
    "bad image": (ImagePrompt([IMAGE_TOKEN] * 2, [CAT, b"x"]), r"images\[1\]: '1 bytes' is not"),
    "too long": (ImagePrompt([*text(60), IMAGE_TOKEN], [picture(8, 8)]),
                 "text: '1.. tokens' is not allowed; this model's maximum context length is 112"),
}  # fmt: skip


def test_mistakes_are_one_line_and_touch_nobody(reference: ImageReference) -> None:
    with engine_of(reference.path) as engine:
        for prompt, error in BAD.values():
            if not error:
                assert engine.generate([prompt], GREEDY)[0].token_ids
                continue
            with pytest.raises(ValueError, match=error) as caught:
                engine.submit(prompt)
            assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match="None with prompt_embeds or images"):
            engine.submit(ONE.prompt, SamplingParams(truncate_prompt_tokens=3))
    with (
        engine_of(reference.path, language_model_only=True) as engine,
        pytest.raises(
            ValueError, match="images: 1 is not allowed; none: the model takes no images"
        ),
    ):
        engine.submit(ONE.prompt)


def test_the_command_line_takes_image_files(
    reference: ImageReference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In front of a prompt that says nothing of them, else where it says so."""
    given, output = [str(tmp_path / f"{n}.png") for n in range(2)], tmp_path / "out.jsonl"
    for path, image in zip(given, (CAT, DOG)):
        image.save(path)
    command = ["generate", "--model", str(reference.path), "--launcher", "thread",
               "--max-model-len", "112", "--ignore-eos", "--max-tokens", "6"]  # fmt: skip
    images = [word for path in given for word in ("--image", path)]
    texts = ["--prompt", "what", "--prompt", "x<image>y<start><image>z"]
    assert main([*command, *images, *texts, "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    front = Pictured.of(START, CAT, END, START, DOG, END, [23, 8, 1, 20])
    within = Pictured.of([24], CAT, [25], START, DOG, [26])
    with engine_of(reference.path) as engine:
        for line, pictured in zip(lines, (front, within), strict=True):
            (due,) = engine.generate([pictured.prompt], GREEDY)
            assert tuple(line["token_ids"]) == due.token_ids
    capsys.readouterr()
    assert main([*command, *images]) == 2
    assert re.search(r"^error: image: .* is not allowed; none without --prompt",
                     capsys.readouterr().err, re.MULTILINE)  # fmt: skip


def test_what_a_rank_needs_for_images_is_planned_and_said(reference: ImageReference) -> None:
    config = EngineConfig(str(reference.path), device="cpu", max_model_len=112, dp_size=2)
    said = describe(config, "cpu")
    assert "images     2 layers of 32; up to 65,536 pixels, 64 tokens; features of 2176" in said
    assert "image features" in said
    plan = plan_rank(config, 0, "cpu")
    assert plan.memory.image_features == 2176 * 64 * 4
    small = plan_rank(replace(config, max_image_pixels=10 * 1024), 0, "cpu")
    assert (small.limits.max_image_tokens, small.limits.num_image_slots) == (10, 2068)
    without = plan_rank(replace(config, language_model_only=True), 0, "cpu")
    assert without.memory.image_features == without.limits.num_image_slots == 0
    with pytest.raises(ValueError, match="image_cache_tokens: 100 is not allowed; at least 128"):
        plan_rank(replace(config, image_cache_tokens=100), 0, "cpu")
