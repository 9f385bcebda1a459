"""Scrape: what a server's /metrics and /health say at one time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPException
from time import monotonic
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, build_opener

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from dp_runtime.errors import ServerSilent

TIMEOUT_S = 15.0  # a server waits a second for ranks that do not answer, and may be busy
MAX_BYTES = 64 << 20
KNOWN_BY = "dp_runtime_steps_total"


@dataclass(frozen=True)
class Scrape:
    at: float = 0.0  # time.monotonic()
    samples: Mapping[str, Sequence[Sample]] = field(default_factory=dict)  # by their name
    health: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, url: str) -> Scrape:
        """Ask a server; ServerSilent says why there is nothing to show."""
        health = _get(f"{url}/health", also=HTTPStatus.SERVICE_UNAVAILABLE)
        return cls.parsed(_get(f"{url}/metrics"), health)

    @classmethod
    def parsed(cls, page: str, health: str) -> Scrape:
        samples: dict[str, list[Sample]] = {}
        try:
            told = json.loads(health)
            for family in text_string_to_metric_families(page):
                for sample in family.samples:
                    samples.setdefault(sample.name, []).append(sample)
        except ValueError as error:
            raise ServerSilent(f"/health or /metrics can not be read: {error}") from None
        if KNOWN_BY not in samples or not isinstance(told, dict):
            raise ServerSilent("/metrics and /health are not those of dp-runtime")
        return cls(monotonic(), samples, told)

    @property
    def dp_ranks(self) -> list[str]:
        return sorted({sample.labels["dp_rank"] for sample in self.samples[KNOWN_BY]}, key=int)

    def having(self, name: str, **labels: str) -> list[Sample]:
        """Return the samples of this name that have these labels."""
        samples = self.samples.get(name, ())
        return [sample for sample in samples if labels.items() <= sample.labels.items()]

    def sum(self, name: str, **labels: str) -> float:
        return sum(sample.value for sample in self.having(name, **labels))


def _get(address: str, also: int = HTTPStatus.OK) -> str:
    """Return the body of an answer with status 200, or `also` that one; no proxy is asked."""
    try:
        with build_opener(ProxyHandler({})).open(address, timeout=TIMEOUT_S) as answer:
            return _text(answer)
    except HTTPError as error:
        with error:
            if error.code == also:
                return _text(error)
            raise ServerSilent(f"{address} answers {error.code}: {_reason(_text(error))}") from None
    except (URLError, HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise ServerSilent(f"{address} does not answer: {reason}") from None


def _reason(body: str) -> str:
    """Return the message of an error in OpenAI's format, or what there is instead."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body


def _text(answer: Any) -> str:
    return str(answer.read(MAX_BYTES).decode(errors="replace"))
