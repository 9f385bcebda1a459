"""Bytes of a model's weights and steps, from shapes alone; each layer counts its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dp_runtime.attention.plan import LayerCache
from dp_runtime.core.cache_spec import LayerState
from dp_runtime.kernels.dense_linear.measured import FewRowsTiles
from dp_runtime.layers.linear import Fp8Linear, Widened
from dp_runtime.models.model import PassModel
from dp_runtime.parallel.buckets import PiecewiseBuckets
from dp_runtime.runner.graphs.forward_pieces import PieceInputs
from dp_runtime.sampling.logprobs import ROWS_AT_ONCE, logprobs_bytes
from dp_runtime.sampling.sampler import sampling_bytes
from dp_runtime.scheduler.limits import Limits
from dp_runtime.speculative.draft import DraftModel
from dp_runtime.startup.served_models import ServedModels

Part = TypeVar("Part")


@dataclass(frozen=True)
class Fp8Shape:
    """A matrix that stays e4m3, and how many outputs it has with those beyond it."""

    outputs: int
    inputs: int
    all_outputs: int

    @classmethod
    def of(cls, linear: Fp8Linear) -> Fp8Shape:
        outputs, inputs = linear.weight.shape
        return cls(outputs, inputs, linear.shape[0])


def param_bytes(models: object) -> int:
    """Count the bytes of all tensors of models, which are dataclasses down to their caches."""
    storages = {}
    for tensor in _tensors(models):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: object) -> Iterator[Tensor]:
    return _parts(value, Tensor)


def fp8_shapes(models: object) -> tuple[Fp8Shape, ...]:
    """List the shapes of matrices that stay e4m3, each once."""
    return tuple(dict.fromkeys(Fp8Shape.of(linear) for linear in _parts(models, Fp8Linear)))


def widened_matrices(models: object) -> tuple[Widened, ...]:
    """List the e4m3 matrices that could not stay so."""
    return tuple(dict.fromkeys(_parts(models, Widened)))


def few_rows_tiles(models: object) -> tuple[FewRowsTiles, ...]:
    """List which matrices few rows are multiplied with by our kernel, each shape once."""
    return tuple(dict.fromkeys(_parts(models, FewRowsTiles)))


def _parts(value: object, kind: type[Part]) -> Iterator[Part]:
    """Find all parts of a kind in dataclasses and tuples."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (LayerCache, LayerState)):
        return
    elif isinstance(value, tuple):
        for item in value:
            yield from _parts(item, kind)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _parts(getattr(value, field.name), kind)


def activation_peak(models: ServedModels, limits: Limits, dp_size: int, padded: bool) -> int:
    """Count the most bytes that a step within the limits allocates at once.

    padded: ranks may contribute padding to the MoE collectives. Not counted, as small beside the
    rest: prompt embeddings, and what kernels allocate for themselves.
    """
    model, draft = models.target, models.draft
    rows, vocab = limits.max_num_tokens, model.vocab_size
    samples = min(limits.max_decode_rows, rows)
    forward = model.forward_bytes(rows, dp_size * rows, padded and dp_size > 1)
    forward += _replay_bytes(model, limits)
    row = model.hidden_size * model.dtype.itemsize
    widened = vocab * 4 if model.dtype.itemsize < 4 else 0  # a row's logits in float32
    sampling = sampling_bytes(samples, vocab) + min(samples, ROWS_AT_ONCE) * widened
    scored = min(rows, ROWS_AT_ONCE)
    scoring = max(
        model.logits_bytes(scored) + scored * widened,
        scored * vocab * 4 + logprobs_bytes(scored, vocab),
    )
    kept = rows * row * (1 + len(model.aux_hidden_state_layers))
    encoded = limits.max_encoded_tokens
    return max(
        forward,
        0 if model.vision is None else model.vision.activation_bytes(encoded),
        kept + samples * row + model.logits_bytes(samples) + sampling,
        kept + rows * row + scoring,
        0 if draft is None else kept + _extend_bytes(draft, limits, dp_size, padded),
    )


def _extend_bytes(draft: DraftModel, limits: Limits, dp_size: int, padded: bool) -> int:
    """Count a draft_extend pass beside the target's rows; draft passes have fewer rows."""
    rows, requests = limits.max_num_tokens, limits.max_num_requests
    row = draft.hidden_size * draft.dtype.itemsize
    forward = draft.forward_bytes(rows, dp_size * rows, padded and dp_size > 1)
    return rows * row + max(forward, rows * row + requests * row + draft.logits_bytes(requests))


def _replay_bytes(model: PassModel, limits: Limits) -> int:
    return max((net.replay_bytes(limits.max_num_requests) for net in model.delta_nets), default=0)


def captured_bytes(models: ServedModels, limits: Limits, dp_size: int) -> int:
    """Count what graphs keep: the memory of the largest of each kind, and what they share."""
    rows, requests = limits.max_decode_rows, limits.max_num_requests
    kinds: list[tuple[PassModel, int, bool]] = [(models.target, rows, True)]
    if models.draft is not None:
        kinds += [(models.draft, requests, True), (models.draft, rows, False)]
    pieces = sum(
        _captured_pieces(model, limits, dp_size, reads_hidden=model is not models.target)
        for model in models.all
    )
    return pieces + sum(
        model.forward_bytes(max_rows, dp_size * max_rows, dp_size > 1)
        + _replay_bytes(model, limits)
        + (model.logits_bytes(max_rows) if with_logits else 0)
        for model, max_rows, with_logits in kinds
    )


def _captured_pieces(model: PassModel, limits: Limits, dp_size: int, reads_hidden: bool) -> int:
    """Count what the pieces of a model's forward keep, and what they share with attention."""
    rows = PiecewiseBuckets.for_steps(limits.max_num_tokens).max_rows
    inputs = PieceInputs.zeros(
        rows, model.hidden_size, reads_hidden, model.backend.spec, model.delta_nets,
        torch.device("meta"),
    )  # fmt: skip
    return param_bytes(inputs) + model.forward_bytes(rows, dp_size * rows, True)
