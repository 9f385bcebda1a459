"""The experts that tokens went to, by an independent forward of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_runtime import RequestOutput
from dp_runtime.core.request import RoutedExperts
from tests.reference import TOLERANCE, Reference, Tokens


def router_logits(reference: Reference, sequences: Sequence[Tokens]) -> list[Tensor]:
    """Float32 [tokens, MoE layers, experts] of every sequence, padded behind their end."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in sequences])
    with torch.inference_mode():
        result = reference.model(ids, output_router_logits=True, use_cache=False)
    layers = [logits.view(*ids.shape, -1) for logits in result.router_logits]
    stacked = torch.stack(layers, 2)
    return [rows[: len(tokens)] for rows, tokens in zip(stacked, sequences)]


def check_routed(reference: Reference, outputs: Sequence[RequestOutput]) -> None:
    """Assert that outputs have the oracle's choices, best first, for every token that ran."""
    sequences = [(*output.prompt_token_ids, *output.token_ids) for output in outputs]
    for output, rows in zip(outputs, router_logits(reference, sequences)):
        assert output.routed_experts is not None
        assert output.routed_experts.dtype == np.uint8
        chosen = torch.from_numpy(output.routed_experts).long()
        logits = rows[:-1]
        best = logits.topk(chosen.shape[-1])
        assert chosen.shape == best.indices.shape, "a row of each layer for every token but one"
        torch.testing.assert_close(logits.gather(-1, chosen), best.values, atol=TOLERANCE, rtol=0)
        assert (chosen.sort(-1).values.diff(dim=-1) > 0).all(), "an expert twice"


@contextmanager
def replaying(reference: Reference, replay: RoutedExperts) -> Iterator[None]:
    """Have the oracle send the first tokens of a sequence to these experts; -1: as it chooses."""
    gates = [layer.mlp.gate for layer in reference.model.model.layers]

    def hook(gate: Any, given: object, result: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, _, ids = result
        ids, scores = ids.clone(), logits.softmax(-1, dtype=torch.float32)
        own = torch.from_numpy(replay[:, gates.index(gate)].astype(np.int64))
        ids[: len(own)] = torch.where(own >= 0, own, ids[: len(own)])
        weights = scores.gather(-1, ids)
        return logits, weights / weights.sum(-1, keepdim=True), ids

    hooks = [gate.register_forward_hook(hook) for gate in gates]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
