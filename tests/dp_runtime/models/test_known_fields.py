"""The tables of fields do not contradict each other, and name what transformers writes."""

from __future__ import annotations

from itertools import chain

import pytest

from dp_runtime.models.known_fields import ALIASES, FIXED, IRRELEVANT, fixed_values, is_irrelevant


def test_a_field_is_in_one_table() -> None:
    names = list(chain.from_iterable(IRRELEVANT.values()))
    assert len(names) == len(set(names))
    assert not set(names) & set(FIXED)
    assert not set(names) & set(ALIASES)
    assert not set(ALIASES) & set(FIXED)


def test_what_every_configuration_of_transformers_has_is_known() -> None:
    from transformers import GenerationConfig, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

    written = {*GenerationConfig().to_dict(), *PreTrainedConfig().to_dict()}
    own = {*Qwen3MoeConfig().to_dict(), *MixtralConfig().to_dict()} - written
    unknown = {n for n in written if not is_irrelevant(n) and fixed_values(n) is None}
    assert unknown - {"rope_parameters"} == set()
    assert "sliding_window" in own


@pytest.mark.parametrize("name", ["linear_num_value_heads", "vision_config", "mamba_d_state"])
def test_families_of_unsupported_fields(name: str) -> None:
    allowed = fixed_values(name)
    assert allowed is not None
    assert 7 not in allowed
    assert {"a": 1} not in allowed
