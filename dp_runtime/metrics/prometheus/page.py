"""The page that Prometheus reads: own metrics, and their names on the dashboards of vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from dp_runtime.metrics.prometheus.families import OWN
from dp_runtime.metrics.prometheus.family import Family
from dp_runtime.metrics.snapshot import RankSnapshot

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
PREFIX = "dp_runtime_"
ALIASES = {
    "vllm:num_requests_running": "requests_running",
    "vllm:num_requests_waiting": "requests_queued",
    "vllm:kv_cache_usage_perc": "kv_usage_ratio",
    "vllm:num_preemptions": "preemptions",
    "vllm:prefix_cache_queries": "prefix_cache_queries",
    "vllm:prefix_cache_hits": "prefix_cache_hits",
    "vllm:prompt_tokens": "prompt_tokens",
    "vllm:generation_tokens": "output_tokens",
    "vllm:iteration_tokens_total": "step_tokens",
    "vllm:request_success": "requests_ended",
    "vllm:time_to_first_token_seconds": "first_token_seconds",
    "vllm:inter_token_latency_seconds": "inter_token_seconds",
    "vllm:e2e_request_latency_seconds": "request_seconds",
    "vllm:request_queue_time_seconds": "queue_seconds",
    "vllm:spec_decode_num_drafts": "verifications",
    "vllm:spec_decode_num_draft_tokens": "drafts_proposed",
    "vllm:spec_decode_num_accepted_tokens": "drafts_accepted",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "drafts_accepted_by_position",
}
ALIAS_LABELS = {"finish_reason": "finished_reason"}


def metrics_page(ranks: Sequence[RankSnapshot], model_name: str, num_standbys: int = 0) -> bytes:
    """Return the page in the text format, whose type CONTENT_TYPE says."""
    standbys = Metric(
        f"{PREFIX}standbys_warm", "Processes that could take a lost rank's place", "gauge"
    )
    standbys.add_sample(standbys.name, {}, num_standbys)
    # Never OpenMetrics: for that prometheus_client (0.26) makes underscores of colons in names.
    return generate_latest(_Page([standbys, *metrics_of(ranks, model_name)]))


def metrics_of(ranks: Sequence[RankSnapshot], model_name: str) -> Iterator[Metric]:
    printable = model_name.encode(errors="replace").decode()
    numbers = [str(rank.dp_rank) for rank in ranks]
    own = [{"dp_rank": number} for number in numbers]
    vllm = [{"model_name": printable, "engine": number, "dp_rank": number} for number in numbers]
    for family in OWN:
        yield replace(family, name=PREFIX + family.name).metric(zip(own, ranks))
    for alias, name in ALIASES.items():
        yield _alias(alias, name).metric(zip(vllm, ranks))


def _alias(alias: str, name: str) -> Family:
    (family,) = (family for family in OWN if family.name == name)
    labels = tuple(ALIAS_LABELS.get(label, label) for label in family.labels)
    return replace(family, name=alias, labels=labels)


class _Page:
    """What prometheus_client takes for a registry."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics
