"""The batched sampler of one rank: logits in, token ids out, nothing waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dp_runtime.batch import Int64
from dp_runtime.distribution import (
    Array,
    change_rows,
    invert,
    keep_weights,
    penalise,
    take_rows,
)
from dp_runtime.logprobs import (
    ROWS_AT_ONCE,
    LogitsOf,
    Logprobs,
    row_parts,
    token_logprobs,
)
from dp_runtime.random_numbers import uniform
from dp_runtime.request import RankRequest, TokenLogprob
from dp_runtime.row_logits import RowLogits
from dp_runtime.sampling_params import SamplingParams
from dp_runtime.transfer import HostCopy, on_device

_FLOAT32 = np.finfo(np.float32)


@dataclass(frozen=True, eq=False)
class SampleRows:
    """Rows of logits that yield a new token each."""

    request_ids: Int64  # [n]
    output_indices: Int64  # [n] which output token of its request this is, from 0

    def __len__(self) -> int:
        return len(self.request_ids)

    def __getitem__(self, some: slice) -> SampleRows:
        return SampleRows(self.request_ids[some], self.output_indices[some])


class SampledTokens(NamedTuple):
    """What was sampled, on the host; one entry per row."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]  # None where none were asked for


@dataclass(frozen=True, eq=False)
class Sampled:
    """The tokens of one step, on the device, with their copy to the host under way."""

    rows: SampleRows
    token_ids: Tensor  # [n] int64
    logprobs: Logprobs | None  # of the rows in logprob_rows
    logprob_rows: tuple[int, ...]
    copy: HostCopy  # token_ids, and whether each row's logits were valid

    def to_host(self) -> SampledTokens:
        """Wait for the copy.

        Asserts that no row's logits had a NaN, a +inf or nothing above -inf: this is where the
        host first looks at what the device computed, so the check costs no wait of its own.
        """
        token_ids, valid = self.copy.wait()
        broken = self.rows.request_ids[~valid.numpy()].tolist()
        assert not broken, f"the model gave NaN or infinite logits for requests {broken}"
        logprobs: list[TokenLogprob | None] = [None] * len(self.rows)
        if self.logprobs is not None:
            for row, entry in zip(self.logprob_rows, self.logprobs.to_host()):
                logprobs[row] = entry
        return SampledTokens(tuple(token_ids.tolist()), tuple(logprobs))


@dataclass(eq=False)
class _Penalties:
    """Which tokens a request has seen; on the device, since the host learns them a step later.

    The tensors are made when the request first samples: many more may be queued than run.
    """

    prompt_ids: Array  # [prompt] int64
    in_prompt: Tensor  # [vocab] bool, empty until then
    output_counts: Tensor  # [vocab] float32, empty until then
    num_outputs: int = 0

    @classmethod
    def of(cls, request: RankRequest, device: torch.device) -> _Penalties:
        prompt_ids = np.array(request.prompt_token_ids, np.int64)
        nothing = torch.empty(0, device=device)
        return cls(prompt_ids, nothing.bool(), nothing)

    def start(self, vocab_size: int) -> None:
        """Make the tensors, at the first call."""
        if self.output_counts.numel():
            return
        device = self.output_counts.device
        in_prompt = np.zeros(vocab_size, np.bool_)
        in_prompt[self.prompt_ids] = True
        self.in_prompt = on_device(in_prompt, device)
        self.output_counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)


@dataclass(frozen=True, eq=False)
class _Request:
    params: SamplingParams
    seed: int
    draw: tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
    stop_ids: Array  # [stops] int64
    bias_ids: Array  # [biases] int64
    biases: Array  # [biases] float32
    penalties: _Penalties | None
    plain: bool  # nothing but the argmax is asked for


CHOICE_BYTES = 38  # per logit, for all filters together


def sampling_bytes(num_rows: int, vocab_size: int) -> int:
    """Most bytes `Sampler.sample` and the penalties of its requests take, besides the logits.

    Not counted: the penalties of requests that were preempted, which keep theirs.
    """
    seen = num_rows * vocab_size * (1 + 4)
    return seen + min(num_rows, ROWS_AT_ONCE) * vocab_size * CHOICE_BYTES


class Sampler:
    """Chooses the next tokens of one rank's requests.

    For every row: (1) log probabilities are taken from the unmodified logits; then the logits go
    through (2) logit_bias, (3) min_tokens: the request's stop ids are masked while output_index <
    min_tokens, (4) repetition penalty over prompt and output tokens (Keskar et al., CTRL, 2019),
    then frequency and presence penalty over output tokens (OpenAI API reference),
    (5) temperature, 0 being the argmax, ties to the lowest id, (6) top_k, keeping what ties with
    the k-th, (7) top_p: the smallest set that reaches it, ties to the lowest id, (8) min_p relative
    to the best token; (9) the inverse of the cumulative distribution in the order of token ids is
    taken at uniform(seed, output_index). A token of probability 0 is never chosen.

    A row's token depends on its request, output_index and logits alone, not on the batch.
    Requests without logit_bias, min_tokens or penalties have no state on the device.
    NOTE: output tokens are counted inside `sample`, so a request with penalties samples every
    output_index once and in order; its counts outlive preemption and end with `remove`.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._requests: dict[int, _Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: RankRequest) -> None:
        """Take up a request; ValueError if its parameters do not fit the vocabulary."""
        assert request.request_id not in self._requests, f"request {request.request_id} twice"
        params, vocab = request.params, self.vocab_size
        params.check_vocabulary(vocab, request.stop_token_ids)
        top_k = min(params.top_k, vocab) if params.top_k > 0 else vocab
        # (logits - max) / temperature must neither become 0 / 0 nor -inf / inf in float32
        temperature = 0.0
        if not params.greedy:
            temperature = float(np.clip(params.temperature, _FLOAT32.tiny, _FLOAT32.max))
        self._requests[request.request_id] = _Request(
            params=params,
            seed=request.seed,
            draw=(temperature, top_k, float(params.top_p), float(params.min_p)),
            stop_ids=np.array([i for i in request.stop_token_ids if i < vocab], np.int64),
            bias_ids=np.array(list(params.logit_bias), np.int64),
            biases=np.array(list(params.logit_bias.values()), np.float32),
            penalties=_Penalties.of(request, self.device) if params.has_penalties else None,
            plain=params.greedy
            and params.logprobs is None
            and not (params.logit_bias or params.min_tokens or params.has_penalties),
        )

    def remove(self, request_id: int) -> None:
        """Forget a request and what the device holds for it."""
        del self._requests[request_id]

    def sample(self, logits: Tensor, rows: SampleRows) -> Sampled:
        """Choose a token for each row of logits [n, vocab], which are left as they are."""
        return self.choose(RowLogits.of(logits), rows)

    def choose(self, logits: RowLogits, rows: SampleRows) -> Sampled:
        """The same where the rows' maxima are known."""
        assert logits.values.shape == (len(rows), self.vocab_size), (
            f"logits {tuple(logits.values.shape)} for {len(rows)} rows of {self.vocab_size} tokens"
        )
        requests = [self._requests[request_id] for request_id in rows.request_ids.tolist()]
        if all(request.plain for request in requests):
            return Sampled(rows, logits.best, None, (), HostCopy(logits.best, logits.valid))
        parts = [
            self._choose(logits[part], rows[part], requests[part]) for part in row_parts(len(rows))
        ]
        token_ids, valid = (torch.cat(tensors) for tensors in zip(*parts))
        self._count(requests, token_ids)
        logprob_rows, logprobs = self._logprobs(logits.values, token_ids, requests)
        return Sampled(rows, token_ids, logprobs, logprob_rows, HostCopy(token_ids, valid))

    def prompt_logprobs(self, logits_of: LogitsOf, target_ids: Tensor, top_n: int) -> Logprobs:
        """Log probabilities of a prompt's tokens, and of the top_n best at their positions.

        logits_of: some of the n prompt rows at a time; target_ids [n] int64: the token after each.
        """
        return token_logprobs(logits_of, target_ids, (top_n,) * len(target_ids))

    def _choose(
        self, logits: RowLogits, rows: SampleRows, requests: list[_Request]
    ) -> tuple[Tensor, Tensor]:
        """Token ids [n], and whether the logits were valid [n]."""
        values = logits.values.float()
        adjusted = self._bias(values, rows, requests)
        adjusted = self._mask_stops(adjusted, rows, requests)
        adjusted = self._penalise(adjusted, rows, requests)
        if adjusted is not values:
            logits = RowLogits.of(adjusted)
        return self._draw(adjusted, logits.peaks, logits.best, rows, requests), logits.valid

    def _bias(self, logits: Tensor, rows: SampleRows, requests: list[_Request]) -> Tensor:
        biased = [(i, r) for i, r in enumerate(requests) if len(r.bias_ids)]
        if not biased:
            return logits
        cells = self._cells([(i, r.bias_ids) for i, r in biased])
        values = on_device(np.concatenate([r.biases for _, r in biased]), self.device)
        return logits.index_put(cells, values, accumulate=True)

    def _mask_stops(self, logits: Tensor, rows: SampleRows, requests: list[_Request]) -> Tensor:
        masked = [
            (i, request.stop_ids)
            for i, (index, request) in enumerate(zip(rows.output_indices.tolist(), requests))
            if index < request.params.min_tokens and len(request.stop_ids)
        ]
        if not masked:
            return logits
        return logits.index_put(self._cells(masked), torch.full((), -torch.inf, device=self.device))

    def _cells(self, ids_of_rows: list[tuple[int, Array]]) -> tuple[Tensor, Tensor]:
        rows = np.repeat([i for i, _ in ids_of_rows], [len(ids) for _, ids in ids_of_rows])
        ids = np.concatenate([ids for _, ids in ids_of_rows])
        return on_device(rows, self.device), on_device(ids, self.device)

    def _penalise(self, logits: Tensor, rows: SampleRows, requests: list[_Request]) -> Tensor:
        index = [i for i, request in enumerate(requests) if request.penalties is not None]
        if not index:
            return logits
        states = [state for request in requests if (state := request.penalties) is not None]
        for i, state in zip(index, states):
            assert rows.output_indices[i] == state.num_outputs, (
                f"request {rows.request_ids[i]} has penalties and {state.num_outputs} outputs, "
                f"and samples output {rows.output_indices[i]}"
            )
            state.num_outputs += 1
            state.start(self.vocab_size)
        picked = (requests[i].params for i in index)
        settings = np.array(
            [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in picked],
            np.float32,
        )
        in_prompt = torch.stack([state.in_prompt for state in states])
        counts = torch.stack([state.output_counts for state in states])
        return change_rows(
            logits,
            np.array(index),
            lambda some: penalise(some, in_prompt, counts, on_device(settings, self.device)),
        )

    def _count(self, requests: list[_Request], token_ids: Tensor) -> None:
        for i, request in enumerate(requests):
            if request.penalties is not None:
                one = torch.ones(1, dtype=torch.float32, device=self.device)
                request.penalties.output_counts.index_add_(0, token_ids[i : i + 1], one)

    def _draw(
        self,
        logits: Tensor,
        peaks: Tensor,
        best: Tensor,
        rows: SampleRows,
        requests: list[_Request],
    ) -> Tensor:
        draws = np.array([request.draw for request in requests], np.float64).reshape(-1, 4)
        index = np.flatnonzero(draws[:, 0])
        if not len(index):
            return best
        counters = np.array([[request.seed for request in requests], rows.output_indices], np.int64)
        device_index = on_device(index, self.device)
        seeds, outputs = on_device(counters[:, index], self.device)
        some, fallback = take_rows(logits, index), best[device_index]
        weights = keep_weights(some, peaks[device_index], draws[index])
        picked = invert(weights, uniform(seeds, outputs), fallback)
        return best.index_copy(0, device_index, picked)

    def _logprobs(
        self, logits: Tensor, token_ids: Tensor, requests: list[_Request]
    ) -> tuple[tuple[int, ...], Logprobs | None]:
        asked = [(i, n) for i, r in enumerate(requests) if (n := r.params.logprobs) is not None]
        if not asked:
            return (), None
        rows, top_n = zip(*asked)
        index = np.array(rows)
        chosen = token_ids[on_device(index, self.device)]
        return rows, token_logprobs(
            lambda part: take_rows(logits, index[part]).float(), chosen, top_n
        )
