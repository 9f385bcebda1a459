"""What a rank's memory lacks, and what would fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dp_runtime.config import EngineConfig
from dp_runtime.host.limits import usable_memory
from dp_runtime.metrics.memory import MemoryUse
from dp_runtime.scheduler.limits import most_requests

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """A rank's memory, what is taken of it before the first page, and what a sequence takes."""

    memory: int  # bytes of the rank
    use: MemoryUse  # without pages
    other: int  # bytes of buffers, graphs, and what min_dp_size sets aside
    page_bytes: int
    slot_bytes: int  # of a request's recurrent state
    num_state_slots: int  # the null slot included
    max_model_len: int
    one_sequence: int  # pages of a sequence of that length with its drafts, and the null page
    dtype_bytes: int  # of a weight
    host_copy: int = 0  # bytes that keep the weights, if the rank's memory is the host's

    @property
    def left(self) -> int:
        return self.memory - self.use.total - self.other - self.host_copy

    @property
    def max_pages(self) -> int:
        return max(self.left, 0) // self.page_bytes

    def pages_within(self, fraction: float) -> int:
        return max(int(self.left * fraction // self.page_bytes), 0)

    def max_requests_beside(self, config: EngineConfig, num_bytes: float) -> int:
        """Count the requests whose recurrent state fits beside so many bytes."""
        if not self.slot_bytes:
            return 0
        fit = int((self.left + self.use.recurrent_state - num_bytes) // self.slot_bytes) - 1
        if config.prefix_caching:
            checkpoints = config.num_state_checkpoints
            fit = most_requests(fit) if checkpoints is None else fit - checkpoints
        return max(fit, 0)

    def shortage(self, config: EngineConfig, fraction: float) -> str:
        """Return one line, or nothing if a sequence of max_model_len fits.

        NOTE: it only advises what helps: no fraction makes room where the weights leave none.
        """
        if self.left < self.page_bytes:
            return self._before_pages(config, fraction)
        fits = self.max_pages if config.num_pages is not None else self.pages_within(fraction)
        wanted = config.num_pages or self.one_sequence
        if fits >= wanted:
            return ""
        length = (fits - 1) * config.page_size - config.speculative_num_steps
        advice = [f"max_model_len {length} fits"] if length >= 2 else []
        value: float
        if config.num_pages is not None:
            name, value = "num_pages", config.num_pages
            advice = [f"at most {fits} fit"]
        else:
            name, value = "max_model_len", self.max_model_len
        if config.num_pages is None and self.max_pages >= wanted:
            needed = math.ceil(1000 * wanted * self.page_bytes / self.left) / 1000
            if not advice:  # no length fits, so it is the fraction that is at fault
                name, value = "kv_memory_fraction", fraction
            advice.append(f"kv_memory_fraction {min(needed, 1.0):g} is enough")
        advice += self._fewer_requests(config, fraction)
        part = "" if config.num_pages is not None else f" and kv_memory_fraction is {fraction:g}"
        return (
            f"{name}: {value} is not allowed; {_gib(wanted * self.page_bytes)} of KV pages "
            f"({wanted} of {self.page_bytes:,} bytes) do not fit: {_gib(self.left)} of "
            f"{_gib(self.memory)} are left{part}; {'; '.join(advice) or self._remedy(config)}"
        )

    def _fewer_requests(self, config: EngineConfig, fraction: float) -> list[str]:
        """Advise as many requests as leave room for the pages, if there are any."""
        pages = (config.num_pages or self.one_sequence) * self.page_bytes
        fit = self.max_requests_beside(config, pages if config.num_pages else pages / fraction)
        return [f"max_num_requests {fit} fits"] if fit else []

    def _before_pages(self, config: EngineConfig, fraction: float) -> str:
        taken = self.use.total + self.other + self.host_copy
        fewer = "; ".join(self._fewer_requests(config, fraction))
        copy = f", their copy {_gib(self.host_copy)} (host_weights)" if self.host_copy else ""
        return (
            f"model: {config.model!r} is not allowed; a rank has {_gib(self.memory)} of memory and "
            f"needs {_gib(taken)} before its first KV page: weights {_gib(self.use.weights)}"
            f"{copy}, workspaces {_gib(self.use.workspaces)}, "
            f"activations {_gib(self.use.activations)}, {self._state}buffers and graphs "
            f"{_gib(self.other)}; {fewer or self._remedy(config)}"
        )

    @property
    def _state(self) -> str:
        features = self.use.image_features
        images = f"image features {_gib(features)} (image_cache_tokens), " if features else ""
        if not self.slot_bytes:
            return images
        state = _gib(self.use.recurrent_state)
        return images + (
            f"recurrent state {state} ({self.num_state_slots} slots of {self.slot_bytes:,} bytes), "
        )

    def _remedy(self, config: EngineConfig) -> str:
        if self.use.weights + self.page_bytes <= self.memory:
            return "lower max_num_tokens or max_num_requests, by which the activations grow"
        half = f"dtype bfloat16 halves the weights to {_gib(self.use.weights // 2)}"
        halved = [half] if self.dtype_bytes == 4 else []
        more = (
            "more memory, since the ranks of a host share it"
            if config.device == "cpu"
            else "larger GPUs, or a larger dp_size, over which the experts are divided"
        )
        return "; ".join([*halved, f"it needs {more}"])


def copy_shortage(host_copy: int, num_ranks: int) -> str:
    """Return one line, or nothing if a copy fits into a rank's share of the host's memory."""
    if not host_copy or host_copy <= (share := usable_memory() // num_ranks):
        return ""
    return (
        f"host_weights: True is not allowed; the copy of a rank's weights takes "
        f"{_gib(host_copy)}, and its share of the host's memory is {_gib(share)}"
    )


def _gib(num_bytes: int) -> str:
    return f"{max(num_bytes, 0) / GIB:,.2f} GiB"
