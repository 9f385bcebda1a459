"""Slo: what a request must keep to count for goodput."""

from __future__ import annotations

from dataclasses import dataclass

from dp_runtime.core.settings import setting
from dp_runtime.experiments.measurement.request_record import RequestRecord
from dp_runtime.experiments.tables import Checked


@dataclass(frozen=True)
class Slo(Checked):
    """Limits of a request, all of which it must keep; None: anything will do."""

    ttft_ms: float | None = setting(None, "milliseconds to the first token", above=0)
    tpot_ms: float | None = setting(None, "milliseconds for each later token, on average", above=0)
    e2e_ms: float | None = setting(None, "milliseconds until the last token", above=0)

    def kept_by(self, record: RequestRecord) -> bool:
        if record.error:
            return False
        limits = (
            (self.ttft_ms, record.ttft_s),
            (self.tpot_ms, record.tpot_s),
            (self.e2e_ms, record.e2e_s),
        )
        return not any(limit is not None and value * 1e3 > limit for limit, value in limits)
