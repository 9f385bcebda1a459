"""The model's context, which a prompt and what is to come after it must fit into."""

from __future__ import annotations

from dp_runtime.core.request import RankRequest
from dp_runtime.errors import ContextExceeded


def check_context(field: str, num_inputs: int, max_model_len: int) -> None:
    """Raise ContextExceeded if a prompt of so many tokens leaves no room for another."""
    if num_inputs >= max_model_len:
        allowed = _context_length(max_model_len, num_inputs)
        raise ContextExceeded(field, f"{num_inputs} tokens", allowed)


def check_room(request: RankRequest, max_model_len: int) -> None:
    """Raise ValueError if fewer than max_tokens fit behind the prompt; else these are just cut."""
    num_inputs, most = len(request.prompt_token_ids), request.params.known_max_tokens
    allowed = _context_length(max_model_len, num_inputs)
    allowed += f" ({most} > {max_model_len} - {num_inputs})"
    if num_inputs + most > max_model_len:
        raise ContextExceeded("max_tokens", most, allowed)


def _context_length(max_model_len: int, num_inputs: int) -> str:
    # Clients look for these very words, to shorten what they ask for.
    limit = f"this model's maximum context length is {max_model_len} tokens"
    return f"{limit} and your request has {num_inputs} input tokens"
