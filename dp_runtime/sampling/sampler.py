"""The batched sampler of one rank: logits in, token ids out, nothing waits for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.batch import SamplePositions
from dp_runtime.core.device_copy import HostCopy, on_device
from dp_runtime.core.request import RankRequest, TokenLogprob
from dp_runtime.sampling.bad_words import mask_bad_words
from dp_runtime.sampling.draft_verification import Verification, accepted_drafts, first_positions
from dp_runtime.sampling.filters import Array, keep_logits, take_rows
from dp_runtime.sampling.logprobs import ROWS_AT_ONCE, LogitsOf, Logprobs, row_parts, token_logprobs
from dp_runtime.sampling.penalties import penalise_rows
from dp_runtime.sampling.request_sampling import RequestSampling
from dp_runtime.sampling.rng import counter_bits
from dp_runtime.sampling.row_logits import RowLogits
from dp_runtime.sampling.token_masks import NO_GRAMMARS, GrammarMasks, mask_rows
from dp_runtime.sampling.token_race import race


class SampledTokens(NamedTuple):
    """What a step sampled, on the host; one entry per row."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]  # None where none were asked for
    num_accepted: tuple[int, ...] = ()  # of each verification, whose next row gave a token too
    invalid: Mapping[int, str] = MappingProxyType({})  # rows whose tokens say nothing, and why
    not_finite: Sequence[int] = ()  # of the chunks that sample nothing, by their last row's values

    def valid_part(self, first: int, end: int) -> tuple[slice, str | None]:
        """The rows from `first` on whose logits were valid, and why those of the next were not."""
        if not self.invalid:
            return slice(first, end), None
        row = min((row for row in self.invalid if first <= row < end), default=end)
        return slice(first, row), self.invalid[row] if row < end else None


@dataclass(frozen=True, eq=False)
class Sampled:
    token_ids: Tensor  # [n] int64
    logprobs: Logprobs | None  # of the rows in logprob_rows
    logprob_rows: tuple[int, ...]
    num_accepted: Tensor | None  # [verifications] int64 drafts of each, if any were verified
    copy: HostCopy  # token_ids, whether each row's logits were valid, and num_accepted
    causes: Mapping[int, str] = field(default_factory=dict)  # by row: why its logits are not valid

    def to_host(self) -> SampledTokens:
        """Wait for the copy, the first that the host sees of the device's results; so check it."""
        token_ids, valid, *accepted = self.copy.wait()
        rows: list[int] = np.flatnonzero(~valid.numpy()).tolist()
        invalid = {row: self.causes.get(row, "") for row in rows}
        logprobs: list[TokenLogprob | None] = [None] * len(token_ids)
        if self.logprobs is not None:
            for row, entry in zip(self.logprob_rows, self.logprobs.to_host()):
                logprobs[row] = entry
        num_accepted = tuple(accepted[0].tolist()) if accepted else ()
        return SampledTokens(tuple(token_ids.tolist()), tuple(logprobs), num_accepted, invalid)


CHOICE_BYTES = 34  # per logit, for all filters together


def sampling_bytes(num_rows: int, vocab_size: int) -> int:
    """Bound what `Sampler.sample` allocates, and penalties of requests that still run."""
    seen = num_rows * vocab_size * (1 + 4)
    return seen + min(num_rows, ROWS_AT_ONCE) * vocab_size * CHOICE_BYTES


class Sampler:
    """Chooses the next tokens of one rank's requests; a PerRequestState.

    Log probabilities are taken from the logits as they are. These then go through logit_bias; masks
    of allowed_token_ids, bad_words, grammars and, below min_tokens, of stop ids; repetition penalty
    over prompt and outputs (Keskar et al., CTRL, 2019), frequency and presence penalty over outputs
    (OpenAI API reference); temperature; top_k with what ties; top_p; min_p. The token is the
    largest of what is left plus noise, a pure function of seed, output index and token id. Other
    ties go to the lowest id. A row's token depends on its request, index and logits alone, not on
    the batch; logits that round differently change it only where the two best tie in that rounding.
    NOTE: penalties and bad_words follow the outputs, of which such a request samples each in order.
    """

    def __init__(self, vocab_size: int, num_table_rows: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._requests: dict[int, RequestSampling] = {}  # by row of the request table
        # columns of the rows, for what every step needs
        self._request_ids = np.zeros(num_table_rows, np.int64)
        self._seeds = np.zeros(num_table_rows, np.int64)
        self._draws = np.zeros((num_table_rows, 4), np.float64)
        self._plain = np.zeros(num_table_rows, np.bool_)
        self._num_plain = 0

    @property
    def all_plain(self) -> bool:
        return self._num_plain == len(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, req_index: int, request: RankRequest, outputs: Sequence[int]) -> None:
        """Raise ValueError if the request's parameters do not fit the vocabulary."""
        assert req_index not in self._requests, f"row {req_index} is taken"
        state = RequestSampling.from_request(request, outputs, self.vocab_size, self.device)
        self._requests[req_index] = state
        self._request_ids[req_index] = request.request_id
        self._seeds[req_index] = request.seed
        self._draws[req_index] = state.draw
        self._plain[req_index] = state.plain
        self._num_plain += state.plain

    def remove(self, req_index: int) -> None:
        self._num_plain -= self._requests.pop(req_index).plain
        self._plain[req_index] = False

    def check(self, req_indices: Sequence[int]) -> None:
        held = sorted(self._requests)
        assert held == sorted(req_indices), f"sampler state of rows {held}, not {req_indices}"

    def sample(
        self,
        logits: RowLogits,
        rows: SamplePositions,
        verification: Verification | None = None,
        grammars: GrammarMasks = NO_GRAMMARS,
    ) -> Sampled:
        assert logits.values.shape == (len(rows), self.vocab_size), (
            f"logits {tuple(logits.values.shape)} for {len(rows)} rows of {self.vocab_size} tokens"
        )
        firsts = rows if verification is None else first_positions(rows, verification)
        if self._plain[firsts.req_indices].all():
            accepted = self._accepted(logits.best, firsts, verification)
            copy = _copied(logits.best, logits.valid, accepted)
            return Sampled(logits.best, None, (), accepted, copy)
        requests = [self._requests[index] for index in firsts.req_indices.tolist()]
        drafted = Verification.none(self.device) if verification is None else verification
        seen, of_rows = self._begin(rows, requests, drafted), drafted.each_row(requests)
        masks = grammars.joined([request.mask for request in of_rows])
        parts = [
            self._choose(logits[part], rows[part], of_rows[part], masks[part], drafted, part.start)
            for part in row_parts(len(rows))
        ]
        token_ids, valid = (torch.cat(tensors) for tensors in zip(*parts))
        accepted = self._accepted(token_ids, firsts, verification)
        if seen:
            emitted = drafted.emitted(accepted, len(rows))
            for span, request in seen:
                request.take(token_ids[span], emitted[span])
        logprob_rows, logprobs = self._logprobs(logits.values, token_ids, of_rows)
        copy = _copied(token_ids, valid, accepted)
        return Sampled(token_ids, logprobs, logprob_rows, accepted, copy, grammars.causes)

    def prompt_logprobs(self, logits_of: LogitsOf, target_ids: Tensor, top_n: int) -> Logprobs:
        """Score the tokens target_ids [n] int64 that follow n prompt rows, and the top_n best."""
        return token_logprobs(logits_of, target_ids, (top_n,) * len(target_ids))

    def _accepted(
        self,
        token_ids: Tensor,
        firsts: SamplePositions,
        verification: Verification | None,
    ) -> Tensor | None:
        if verification is None:
            return None
        if verification.forced is None:
            sampled = token_ids[: verification.num_rows].view(-1, verification.rows_each)
            return accepted_drafts(sampled, verification.drafts)
        verified = firsts[: len(verification)]
        counters = np.stack([self._seeds[verified.req_indices], verified.output_indices])
        seeds, indices = on_device(counters, self.device)
        return verification.forced.accepted(seeds, indices, verification.num_drafts)

    def _choose(
        self,
        logits: RowLogits,
        rows: SamplePositions,
        requests: list[RequestSampling],
        masks: list[Array | None],
        verification: Verification,
        first_row: int,
    ) -> tuple[Tensor, Tensor]:
        """Return token ids [n] and whether logits were valid [n], for rows from first_row on."""
        values = logits.values.float()
        adjusted = self._bias(values, requests)
        adjusted = mask_rows(adjusted, masks)
        words = [request.bad_words for request in requests]
        adjusted = mask_bad_words(adjusted, words, verification, first_row)
        adjusted = self._mask_stops(adjusted, rows, requests)
        states = [request.penalties for request in requests]
        adjusted = penalise_rows(adjusted, states, verification, first_row)
        if adjusted is not values:
            logits = RowLogits.from_logits(adjusted)
        return self._draw(adjusted, logits.peaks, logits.best, rows), logits.valid

    def _bias(self, logits: Tensor, requests: list[RequestSampling]) -> Tensor:
        biased = [(i, r) for i, r in enumerate(requests) if len(r.bias_ids)]
        if not biased:
            return logits
        cells = self._cells([(i, r.bias_ids) for i, r in biased])
        values = on_device(np.concatenate([r.biases for _, r in biased]), self.device)
        return logits.index_put(cells, values, accumulate=True)

    def _mask_stops(
        self, logits: Tensor, rows: SamplePositions, requests: list[RequestSampling]
    ) -> Tensor:
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

    def _begin(
        self, rows: SamplePositions, requests: list[RequestSampling], verification: Verification
    ) -> list[tuple[slice, RequestSampling]]:
        seen = [
            (verification.rows_of(number), request)
            for number, request in enumerate(requests)
            if request.order is not None
        ]
        for span, request in seen:
            request_id = int(self._request_ids[rows.req_indices[span.start]])
            index = int(rows.output_indices[span.start])
            request.begin(request_id, index, span.stop - span.start, self.vocab_size)
        return seen

    def _draw(
        self,
        logits: Tensor,
        peaks: Tensor,
        best: Tensor,
        rows: SamplePositions,
    ) -> Tensor:
        draws = self._draws[rows.req_indices]
        index = np.flatnonzero(draws[:, 0])
        if not len(index):
            return best
        counters = np.stack([self._seeds[rows.req_indices], rows.output_indices])
        device_index = on_device(index, self.device)
        seeds, outputs = on_device(counters[:, index], self.device)
        drawn, fallback = take_rows(logits, index), best[device_index]
        kept = keep_logits(drawn, peaks[device_index], draws[index])
        tokens, valid = race(kept, counter_bits(seeds, outputs))
        return best.index_copy(0, device_index, torch.where(valid, tokens, fallback))

    def _logprobs(
        self, logits: Tensor, token_ids: Tensor, requests: list[RequestSampling]
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


def _copied(token_ids: Tensor, valid: Tensor, accepted: Tensor | None) -> HostCopy:
    return HostCopy(token_ids, valid, *([] if accepted is None else [accepted]))
