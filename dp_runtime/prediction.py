"""What a model's weights and steps will take, from shapes alone; the layers know their own part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from torch import Tensor

from dp_runtime.graph_buckets import StageBuckets
from dp_runtime.logprobs import ROWS_AT_ONCE, logprobs_bytes
from dp_runtime.models import Model
from dp_runtime.sampling import sampling_bytes
from dp_runtime.scheduler import Limits


def held_bytes(model: Model) -> int:
    """Bytes of all tensors of a model, which is dataclasses all the way down to its backends."""
    storages = {}
    for tensor in _tensors(model):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            if field.name != "backend":  # it is bound to the page pool
                yield from _tensors(getattr(value, field.name))


def activation_peak(model: Model, limits: Limits, dp_size: int, padded: bool) -> int:
    """Most bytes that a step within the limits allocates at once.

    padded: ranks may contribute rows that are not real to the MoE collectives. Not counted, since
    small beside the rest: prompt embeddings, and what kernels allocate for themselves.
    """
    rows, vocab = limits.max_num_tokens, model.config.vocab_size
    samples = min(limits.max_num_requests, rows)
    forward = model.forward_bytes(rows, dp_size * rows, padded and dp_size > 1)
    hidden = model.config.hidden_size * model.dtype.itemsize
    widened = vocab * 4 if model.dtype.itemsize < 4 else 0  # a row's logits in float32
    sampling = sampling_bytes(samples, vocab) + min(samples, ROWS_AT_ONCE) * widened
    some = min(rows, ROWS_AT_ONCE)
    scoring = max(
        model.logits_bytes(some) + some * widened, some * vocab * 4 + logprobs_bytes(some, vocab)
    )
    return max(
        forward,
        rows * hidden + samples * hidden + model.logits_bytes(samples) + sampling,
        2 * rows * hidden + scoring,
    )


def captured_bytes(model: Model, limits: Limits, dp_size: int) -> int:
    """What graphs keep: the memory of the largest of each kind, and what they share."""
    rows, stage_rows = limits.max_num_requests, StageBuckets.of(limits.max_num_tokens).most
    decode = model.forward_bytes(rows, dp_size * rows, dp_size > 1) + model.logits_bytes(rows)
    if not model.num_moe_layers:
        return decode
    buffers = 2 * stage_rows * model.config.hidden_size * model.dtype.itemsize
    return decode + buffers + model.forward_bytes(stage_rows, dp_size * stage_rows, True)
