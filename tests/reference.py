"""transformers as the oracle of one checkpoint, and what served tokens must be by it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dp_runtime.core.request import RequestOutput
from tests.checkpoints import oracle

TOLERANCE = 1e-4
BATCH = 16

Tokens = tuple[int, ...]


class NearTie(UserWarning):
    """A token that differs because the oracle itself has it level with its own choice."""


class Reference:
    """The oracle of one checkpoint; it remembers its answers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = oracle(path)
        self._logits: dict[Tokens, Tensor] = {}

    @property
    def embeddings(self) -> Tensor:
        """[vocab, hidden]"""
        weight: Tensor = self.model.get_input_embeddings().weight.detach()
        return weight

    def logits(self, sequences: Sequence[Tokens]) -> list[Tensor]:
        """Float32 logits [tokens, vocab] of every sequence.

        Several run together, padded behind their end, where a causal model does not look.
        """
        new = sorted({*sequences} - self._logits.keys(), key=len)
        for start in range(0, len(new), BATCH):
            some = new[start : start + BATCH]
            longest = len(some[-1])
            ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in some])
            with torch.inference_mode():
                logits = self.model(ids, use_cache=False).logits
            for tokens, rows in zip(some, logits):
                self._logits[tokens] = rows[: len(tokens)].clone()
        return [self._logits[tokens] for tokens in sequences]


def check_greedy(
    reference: Reference, outputs: Sequence[RequestOutput], prompts: Sequence[Tokens]
) -> None:
    """Assert that outputs are the oracle's greedy continuations, with its log probabilities.

    prompts: the token ids whose embeddings the model saw. The oracle sees prompt and output
    tokens at once; a token that is not its choice must be level with it, and is then a warning.
    """
    sequences = [(*prompt, *output.token_ids) for prompt, output in zip(prompts, outputs)]
    for prompt, output, logits in zip(prompts, outputs, reference.logits(sequences)):
        logprobs = logits.log_softmax(-1)
        ahead = logprobs[len(prompt) - 1 : -1]  # the row before each output token
        for tie in near_ties(output.token_ids, ahead):
            where = f"{reference.path.name}, prompt of {len(prompt)}"
            warnings.warn(f"{where}: {tie}", NearTie, stacklevel=2)
        check_logprobs(output, ahead, logprobs[: len(prompt) - 1])


def near_ties(token_ids: Sequence[int], logprobs: Tensor) -> Iterator[str]:
    """Outputs that are not the argmax; asserts that they might as well be."""
    for index, (token, row) in enumerate(zip(token_ids, logprobs, strict=True)):
        best = int(row.argmax())
        if token != best:
            gap = float(row[best] - row[token])
            assert gap < TOLERANCE, f"output {index} is {token}, not {best}, which leads by {gap}"
            yield f"output {index} is {token}, not {best}, which leads by {gap:.1e}"


def check_logprobs(output: RequestOutput, ahead: Tensor, before: Tensor) -> None:
    """Compare the reported log probabilities, as far as there are any.

    ahead [outputs, vocab], before [prompt - 1, vocab]: log probabilities by the oracle.
    """
    reported = [
        (output.logprobs, output.token_ids, ahead),
        (output.prompt_logprobs, output.prompt_token_ids[1:], before),
    ]
    for entries, token_ids, rows in reported:
        if entries is None:
            continue
        assert [entry.token_id for entry in entries] == list(token_ids)
        if entries:
            found = torch.tensor([entry.logprob for entry in entries])
            expected = rows.gather(1, torch.tensor(token_ids)[:, None]).squeeze(1)
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        for entry, row in zip(entries, rows, strict=True):
            values = torch.tensor([value for _, value in entry.top])
            best = row.topk(len(values)).values
            torch.testing.assert_close(values, best, atol=TOLERANCE, rtol=0)
            ids = [token for token, _ in entry.top]
            torch.testing.assert_close(row[ids], best, atol=TOLERANCE, rtol=0)
