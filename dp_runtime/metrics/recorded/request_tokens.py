"""RequestTokens: what a request asked and got, for a replay that is to have the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dp_runtime.core.request import RankRequest
from dp_runtime.core.sampling_params import SamplingParams

OF_THE_DRIVER = ("timeout_s", "stop")  # a replay ends requests where they ended


@dataclass(frozen=True)
class RequestTokens:
    request_id: int
    prompt: tuple[int, ...]
    outputs: tuple[int, ...]
    seed: int
    stop_token_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]
    params: Mapping[str, Any]  # fields of SamplingParams that are not as usual

    @classmethod
    def of(cls, request: RankRequest, outputs: tuple[int, ...]) -> RequestTokens | None:
        """Keep a request; None if it has more than tokens: embeddings, images or experts."""
        if request.embeds is not None or request.images or request.replay is not None:
            return None
        usual = SamplingParams()
        given = {
            item.name: getattr(request.params, item.name)
            for item in fields(SamplingParams)
            if getattr(request.params, item.name) != getattr(usual, item.name)
        }
        plain = asdict(SamplingParams(**given))
        params = {name: plain[name] for name in given if name not in OF_THE_DRIVER}
        stops = tuple(sorted(request.stop_token_ids))
        return cls(
            request.request_id, request.prompt_token_ids, outputs, request.seed, stops,
            request.bad_words, params,
        )  # fmt: skip

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> RequestTokens:
        """Read what JSON has of one."""
        lists = {name: tuple(values[name]) for name in ("prompt", "outputs", "stop_token_ids")}
        params = dict(values["params"])
        if "logit_bias" in params:
            params["logit_bias"] = {int(token): n for token, n in params["logit_bias"].items()}
        words = tuple(map(tuple, values["bad_words"]))
        SamplingParams(**params)  # checks them
        return cls(**{**values, **lists, "bad_words": words, "params": params})

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(**self.params)
