"""The page that Prometheus reads, of an engine that verifies drafts."""

import re
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families as parse

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.metrics.prometheus.page import metrics_page
from dp_runtime.metrics.snapshot import RankSnapshot
from dp_runtime.metrics.status import StateUse
from tests.checkpoints import add_mtp, tiny_checkpoint

DP_SIZE = 2
COUNTED_BY_VLLM = {
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
}
MEASURED_BY_VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
}
DISTRIBUTED_BY_VLLM = {
    "vllm:iteration_tokens_total",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
}
Series = tuple[str, tuple[tuple[str, str], ...]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    checkpoint = add_mtp(tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")))
    config = EngineConfig(
        str(checkpoint), dp_size=DP_SIZE, launcher="thread", max_model_len=64, num_pages=40,
        speculative_num_steps=2,
    )  # fmt: skip
    with Engine(config) as engine:
        serve(engine)
        yield engine


def serve(engine: Engine) -> None:
    params = SamplingParams(max_tokens=7, ignore_eos=True)
    engine.generate([[1, 2, 3], [4] * 9, [5]], params, dp_ranks=[0, 0, 1])


def families(ranks: tuple[RankSnapshot, ...], model_name: str = "tiny") -> dict[str, Metric]:
    text = metrics_page(ranks, model_name).decode()
    return {family.name: family for family in parse(text)}


def samples(page: dict[str, Metric]) -> dict[Series, float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in page.values()
        for sample in family.samples
    }


def by_rank(page: dict[str, Metric], name: str, **labels: str) -> list[float]:
    """One number for each rank: the sum of its samples that have these labels."""
    found = [
        (sample.labels["dp_rank"], sample.value)
        for family in page.values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert found, name
    return [sum(value for rank, value in found if rank == str(own)) for own in range(DP_SIZE)]


def test_dashboards_of_vllm_find_their_metrics(engine: Engine) -> None:
    page = families(engine.metrics())
    distributed = {f"{name}{end}" for name in DISTRIBUTED_BY_VLLM for end in ("_sum", "_count")}
    for name in COUNTED_BY_VLLM | MEASURED_BY_VLLM | distributed:
        found = [s for family in page.values() for s in family.samples if s.name == name]
        assert {sample.labels["dp_rank"] for sample in found} == {"0", "1"}, name
        for sample in found:
            assert sample.labels["engine"] == sample.labels["dp_rank"]
            assert sample.labels["model_name"] == "tiny"
    reasons = [sample.labels["finished_reason"] for sample in page["vllm:request_success"].samples]
    assert set(reasons) == {"stop", "length", "abort", "error", "timeout"}
    for name in DISTRIBUTED_BY_VLLM:
        assert page[name].type == "histogram"


def test_the_page_says_what_the_report_and_the_traces_say(engine: Engine) -> None:
    page, report, steps = families(engine.metrics()), engine.report(), engine.step_trace()
    assert by_rank(page, "dp_runtime_steps_total") == [report.steps] * DP_SIZE
    assert by_rank(page, "dp_runtime_output_tokens_total") == list(report.output_tokens_by_rank)
    assert sum(by_rank(page, "dp_runtime_prompt_tokens_total")) == report.prompt_tokens
    assert by_rank(page, "dp_runtime_idle_steps_total") == list(report.idle_steps)
    real, gathered = (
        sum(by_rank(page, f"dp_runtime_{kind}_rows_total")) for kind in ("real", "gathered")
    )
    assert 1 - real / gathered == pytest.approx(report.padding_waste)
    assert by_rank(page, "dp_runtime_step_seconds_count") == [report.steps] * DP_SIZE
    assert by_rank(page, "dp_runtime_wait_seconds_total") == pytest.approx(list(report.wait_s))
    phases = by_rank(page, "dp_runtime_step_phase_seconds_total")
    spent = [busy + wait for busy, wait in zip(report.busy_s, report.wait_s, strict=True)]
    assert phases == pytest.approx(spent)
    assert by_rank(page, "dp_runtime_step_seconds_sum") == pytest.approx(spent)
    for kind in ("draft", "target", "draft_extend"):
        counted = by_rank(page, "dp_runtime_passes_total", **{"pass": kind, "mode": "eager"})
        for rank, count in enumerate(counted):
            own = [each for step in steps if step.dp_rank == rank for each in step.passes]
            ran = [each for each in own if (each.pass_kind, each.mode) == (kind, "eager")]
            assert count == len(ran) > 0
    assert sum(by_rank(page, "dp_runtime_drafts_proposed_total")) == report.drafts_proposed > 0
    assert sum(by_rank(page, "dp_runtime_drafts_accepted_total")) == report.drafts_accepted
    assert sum(by_rank(page, "dp_runtime_accepted_length_sum")) == report.drafts_accepted
    assert sum(by_rank(page, "dp_runtime_accepted_length_count")) == report.verifications
    positions = by_rank(page, "vllm:spec_decode_num_accepted_tokens_per_pos_total")
    assert sum(positions) == report.drafts_accepted
    ended = sum(by_rank(page, "dp_runtime_requests_ended_total", finish_reason="length"))
    assert ended == report.requests


def test_every_request_is_measured_once_and_every_token_but_the_first(engine: Engine) -> None:
    page, report = families(engine.metrics()), engine.report()
    for name in ("first_token", "queue", "request"):
        assert sum(by_rank(page, f"dp_runtime_{name}_seconds_count")) == report.requests, name
    between = sum(by_rank(page, "dp_runtime_inter_token_seconds_count"))
    assert between == report.output_tokens - report.requests


def test_an_idle_engine_holds_no_pages(engine: Engine) -> None:
    page = families(engine.metrics())
    assert by_rank(page, "vllm:kv_cache_usage_perc") == [0.0] * DP_SIZE
    assert by_rank(page, "dp_runtime_kv_pages_free") == [39.0] * DP_SIZE
    assert by_rank(page, "dp_runtime_rank_answers") == [1.0] * DP_SIZE


def test_slots_of_states_are_those_that_ranks_tell(engine: Engine) -> None:
    use = StateUse(4, 3, 8, 6, 5)
    told = [replace(rank, health=replace(rank.health, states=use)) for rank in engine.metrics()]
    names = (
        "slots", "slots_free", "checkpoints", "checkpoints_free", "checkpoint_evictions_total",
    )  # fmt: skip
    for ranks, numbers in ((told, astuple(use)), (engine.metrics(), (0, 0, 0, 0, 0))):
        page = families(tuple(ranks))
        for name, number in zip(names, numbers, strict=True):
            assert by_rank(page, f"dp_runtime_state_{name}") == [number] * DP_SIZE


def test_counters_never_fall(engine: Engine) -> None:
    before = families(engine.metrics())
    serve(engine)
    after = families(engine.metrics())
    counted = {name for name, family in before.items() if family.type in ("counter", "histogram")}
    earlier, later = (samples({name: page[name] for name in counted}) for page in (before, after))
    assert earlier.keys() <= later.keys()
    assert all(later[series] >= value for series, value in earlier.items())
    assert by_rank(after, "dp_runtime_steps_total") > by_rank(before, "dp_runtime_steps_total")


def test_buckets_add_up_to_the_count(engine: Engine) -> None:
    page = families(engine.metrics())
    for family in page.values():
        if family.type == "histogram":
            for rank in map(str, range(DP_SIZE)):
                own = [sample for sample in family.samples if sample.labels["dp_rank"] == rank]
                buckets = [s for s in own if s.name.endswith("_bucket")]
                bounds = [float(s.labels["le"]) for s in buckets]
                counts = [s.value for s in buckets]
                assert bounds == sorted(bounds)
                assert counts == sorted(counts)
                assert bounds[-1] == float("inf")
                assert [counts[-1]] == [s.value for s in own if s.name.endswith("_count")]


def test_a_rank_that_does_not_answer_keeps_its_numbers(engine: Engine) -> None:
    first, second = engine.metrics()
    page = families((first, replace(second, answered=False)))
    assert by_rank(page, "dp_runtime_rank_answers") == [1.0, 0.0]
    assert by_rank(page, "dp_runtime_steps_total")[1] == second.totals.steps > 0


@pytest.mark.parametrize("name", ['a "quoted" name', "a\\b\nc", '{dp_rank="7"} 1', "Modell ä 模型"])
def test_any_name_of_a_model_can_be_a_label(engine: Engine, name: str) -> None:
    page = families(engine.metrics(), name)
    found = {sample.labels["model_name"] for sample in page["vllm:num_preemptions"].samples}
    assert found == {name}


def test_a_name_that_is_no_text_does_not_break_the_page(engine: Engine) -> None:
    page = families(engine.metrics(), "bad\udcff")
    found = {sample.labels["model_name"] for sample in page["vllm:num_preemptions"].samples}
    assert found == {"bad?"}


def test_the_documentation_lists_every_metric(engine: Engine) -> None:
    lines = Path("docs/observability.md").read_text().splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    aliases = {name for row in rows for name in re.findall(r"`(\w+)`", row[2])}
    counted = {"counter": "_total"}
    names = {
        name + counted.get(family.type, "") for name, family in families(engine.metrics()).items()
    }
    own = {name.removeprefix("dp_runtime_") for name in names if name.startswith("dp_runtime_")}
    assert own <= listed
    assert {name.removeprefix("vllm:") for name in names if name.startswith("vllm:")} <= aliases
