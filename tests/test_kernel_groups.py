"""What benchmarks say of a profile: kernels by group, and the least time of each group."""

from __future__ import annotations

from pathlib import Path

import pytest

from dp_runtime.models.registry import read_model_config
from examples.benchmarks.harness.floors import DecodeBytes, DecodeOperations, longer_parts_s
from examples.benchmarks.harness.kernel_groups import (
    ATTENTION,
    DENSE,
    EXPERTS,
    GROUPS,
    OTHER,
    WIRE,
    RankRows,
    Rates,
    busy_us,
    busy_us_of_steps,
    collective_us,
    floors_us,
    group_of,
    group_table,
    group_us,
    num_launches,
)
from examples.benchmarks.harness.kernel_profile import Profile, Span
from examples.nvl4.shape import write_shape

PROFILE = Profile(
    (
        ("gate_up_kernel", 48.0, 2600.0),
        ("gather_kernel", 48.0, 700.0),
        ("nvjet_tst_64x8_TNT", 97.0, 800.0),
        ("reduce_scatter_kernel", 48.0, 300.0),
        ("_route_kernel", 48.0, 150.0),
        ("void at::native::vectorized_elementwise_kernel<4>", 3.0, 9.0),
    ),
    span_us=5000.0, idle_us=441.0, short_us=400.0,
)  # fmt: skip


def test_every_kernel_is_in_one_group_and_waits_are_not_busy() -> None:
    found = group_us(PROFILE)
    assert sum(found.values()) == sum(us for _, _, us in PROFILE.kernels)
    assert found[WIRE] == 1000.0
    assert collective_us(PROFILE) == 1000.0
    assert busy_us(PROFILE) == sum(found.values()) - 1000.0
    assert num_launches(PROFILE) == 51.0
    assert group_of("fmha_v2_flash_attention_bf16") == group_of("kernel_mha") == ATTENTION
    assert group_of("_add_rms_norm_kernel") == group_of("_gated_rms_norm_kernel") == "norms"
    assert group_of("_multiply_gate_kernel") == group_of("_add_gated_kernel") == "gates"
    assert (group_of("_product_kernel"), group_of("product_kernel")) == ("routing", DENSE)
    assert group_of("_rotate_and_append_kernel") == "rotation and append"


def test_a_step_begins_with_its_first_stage_and_ends_before_the_next_ones() -> None:
    """Two steps of two stages; the kernels take 1, 2, 3 ... 12 us."""
    names = ("fmha", "gather_kernel", "down_kernel") * 4
    spans = [Span(100.0 * i, 100.0 * i + i + 1, name) for i, name in enumerate(names)]
    profile = Profile.from_spans(spans, 2)
    assert profile.by_step == (
        {"fmha": 1.0 + 4 + 7, "gather_kernel": 2.0 + 5, "down_kernel": 3.0 + 6},
        {"fmha": 10.0, "gather_kernel": 8.0 + 11, "down_kernel": 9.0 + 12},
    )
    assert busy_us_of_steps(profile, with_collectives=False) == (21.0, 31.0)
    assert busy_us_of_steps(profile, with_collectives=True) == (28.0, 50.0)
    assert Profile.from_spans(spans[:1], 1).by_step == (), "one rank exchanges nothing"


def test_the_table_has_a_line_for_every_group_with_time() -> None:
    table = group_table([PROFILE], ["rank 0"], [{EXPERTS: 2280.0}]).splitlines()
    assert [line[:24].strip() for line in table] == [
        "us a step", *(name for name in (*GROUPS, OTHER) if name in group_us(PROFILE)),
        "nothing", "in all",
    ]  # fmt: skip
    (experts,) = (line for line in table if line.startswith(EXPERTS))
    assert experts.split()[1:] == ["2600", "2280"]


def test_floors_of_decodes_are_bytes_and_those_of_prompts_operations(tmp_path: Path) -> None:
    """The Qwen3-30B-A3B shape over four ranks, where figures are known from its sizes."""
    model = read_model_config(str(write_shape(tmp_path, "qwen3-30b-a3b")))
    rates = Rates(read=4e12, matmul=8e14, wire=4e11)
    decodes = floors_us(model, RankRows(0, 0.0, 64, 1, 1152.0, 256, 4), rates)
    one_expert = 3 * 768 * 2048 * 2
    assert decodes[EXPERTS] == pytest.approx(48 * 32 * one_expert / 4e6, rel=1e-3)
    assert decodes[ATTENTION] == pytest.approx(48 * 64 * 1152 * 2 * 4 * 128 * 2 / 4e6)
    weights = 48 * 72 * 128 * 2048 + 151936 * 2048
    assert decodes[DENSE] == pytest.approx(2 * weights / 4e6)
    assert decodes[WIRE] == pytest.approx(2 * 48 * 192 * 2048 * 2 / 4e5)
    prompts = floors_us(model, RankRows(8192, 512.0, 0, 1, 0.0, 4 * 8192, 4), rates)
    assert prompts[DENSE] == pytest.approx(2 * 8192 * 48 * 72 * 128 * 2048 / 8e8)
    assert prompts[EXPERTS] == pytest.approx(2 * 48 * 8192 * 8 * one_expert / 2 / 8e8)


def test_a_rank_receives_the_rows_of_others_and_their_sums_of_its_own(tmp_path: Path) -> None:
    model = read_model_config(str(write_shape(tmp_path, "qwen3-30b-a3b")))
    rates = Rates(read=4e12, matmul=8e14, wire=4e11)
    for own in (512, 32):  # of 544 rows of two ranks
        floors = floors_us(model, RankRows(own, 256.0, 0, 1, 0.0, 544, 2), rates)
        assert floors[WIRE] == pytest.approx(48 * 544 * 2048 * 2 / 4e5)


def test_few_rows_are_read_and_verifications_of_many_computed(tmp_path: Path) -> None:
    model = read_model_config(str(write_shape(tmp_path, "qwen3-30b-a3b", mtp_layers=1)))
    dense, head = 48 * 72 * 128 * 2048, 151936 * 2048
    moved = DecodeBytes.for_step(model, 2, 128, 1152.0, 128.0)
    computed = DecodeOperations.for_step(model, 128, 1152.0)
    assert computed.dense_weights == pytest.approx(2 * 128 * dense)
    assert computed.lm_head == pytest.approx(2 * 128 * head)
    assert computed.experts == pytest.approx(2 * 128 * 48 * 8 * 3 * 768 * 2048)
    assert computed.kv_cache == pytest.approx(4 * 128 * 48 * 1152 * 32 * 128)
    decodes = longer_parts_s(moved, computed, 4e12, 8e14)
    assert decodes == {part: count / 4e12 for part, count in vars(moved).items()}
    moved = DecodeBytes.for_step(model, 2, 128, 1152.0, 128.0, num_drafts=3)
    computed = DecodeOperations.for_step(model, 128, 1152.0, num_drafts=3)
    draft = 72 * 128 * 2048 + 2 * 2048**2
    assert computed.dense_weights == pytest.approx(2 * 128 * (4 * dense + 3 * draft))
    assert computed.lm_head == pytest.approx(2 * 128 * (4 + 3) * head)
    verified = longer_parts_s(moved, computed, 4e12, 8e14)
    assert verified["dense_weights"] == pytest.approx(computed.dense_weights / 8e14)
    assert verified["experts"] == pytest.approx(moved.experts / 4e12)
