"""The adapter of the GPU kernels over kernels in plain torch, and every call it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dp_runtime.attention.kernel_groups import KernelGroup, KernelPlan
from dp_runtime.attention.kv_write import CacheSlots, quantize
from dp_runtime.attention.registry import make_backend
from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.attention.trtllm import TrtllmAttention, make_layers
from dp_runtime.core.metadata import AttentionMetadata, PageGeometry, Place
from dp_runtime.core.rotation import QkNormRope
from dp_runtime.errors import ContractViolation
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.layers.rotary import rotate
from tests.dp_runtime.fake_kernels import FakeKernels
from tests.dp_runtime.paged import CPU, paged_batch, random_page_table

FP32, BF16, E4M3 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
PAGE, HEADS, KV_HEADS, DIM = 4, 4, 2, 8
WHERE = "rank 5, step 7, pass target, layer 1: "
SCALES = KvScales(0.03, 0.07)


class Call:
    """One call on layer 1 of 2, with everything a test may replace."""

    def __init__(
        self, lengths: list[tuple[int, int]], kv_dtype: torch.dtype = FP32, seed: int = 0,
        lens: tuple[int, ...] = (1, 4), check_device_values: bool = False,
    ) -> None:  # fmt: skip
        self.spec = AttentionSpec(
            HEADS, KV_HEADS, DIM, PAGE, FP32, kv_dtype, frozenset(lens), check_device_values
        )
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        table, num_pages = random_page_table([s for _, s in lengths], PAGE, rng)
        batch = paged_batch(lengths, table, PAGE)
        pages = PageGeometry(num_pages, PAGE)
        self.metadata = AttentionMetadata.build(batch, pages, Place(5, 7, "target"), CPU)
        rows = batch.num_tokens
        self.q = torch.randn(rows, HEADS, DIM, generator=generator)
        self.k = torch.randn(rows, KV_HEADS, DIM, generator=generator)
        self.v = torch.randn(rows, KV_HEADS, DIM, generator=generator)
        pool = torch.randn(num_pages, 2, KV_HEADS, PAGE, DIM, generator=generator)
        self.scales = SCALES if kv_dtype is E4M3 else KvScales()
        self.pool = torch.stack(
            [quantize(pool[:, 0], SCALES.k), quantize(pool[:, 1], SCALES.v)], 1
        ) if kv_dtype is E4M3 else pool  # fmt: skip

    def backend(self) -> TrtllmAttention:
        pools, scales = [self.pool.clone(), self.pool.clone()], [self.scales] * 2
        backend = make_layers(self.spec, pools, scales, FakeKernels())(1)
        assert isinstance(backend, TrtllmAttention)
        return backend

    def run(self, **changes: Any) -> Tensor:
        call = {"q": self.q, "k": self.k, "v": self.v, "metadata": self.metadata, **changes}
        return self.backend()(call["q"], call["k"], call["v"], call["metadata"])

    def reference(self) -> Tensor:
        pools = [self.pool.clone()]
        backend = make_backend("torch_ref", self.spec, pools, [self.scales])(0)
        return backend(self.q, self.k, self.v, self.metadata)

    def refused(self, numbers: tuple[str, ...], **changes: Any) -> None:
        """The call is refused before the pool is written, and the message has both numbers."""
        backend = self.backend()
        before = backend.pool.clone()
        call = {"q": self.q, "k": self.k, "v": self.v, "metadata": self.metadata, **changes}
        with pytest.raises(ContractViolation) as caught:
            backend(call["q"], call["k"], call["v"], call["metadata"])
        text = str(caught.value)
        assert text.startswith(WHERE)
        assert all(number in text for number in numbers), text
        assert torch.equal(backend.pool.view(torch.uint8), before.view(torch.uint8))


LENGTHS = [(1, 9), (4, 12), (1, 3), (6, 6), (4, 4)]
ROWS, REQUESTS = 16, 5
requests = st.lists(
    st.tuples(st.sampled_from([1, 1, 1, 2, 4, 4, 7, 12]), st.integers(0, 30)),
    min_size=1, max_size=8,
).map(lambda pairs: [(q, q + h) for q, h in pairs])  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(requests, st.sets(st.integers(1, 8), min_size=1, max_size=4), st.integers(0, 2**31))
def test_groups_tell_a_kernel_all_it_needs(
    lengths: list[tuple[int, int]], lens: set[int], seed: int
) -> None:
    call = Call(lengths, seed=seed, lens=tuple(lens), check_device_values=True)
    torch.testing.assert_close(call.run(), call.reference(), atol=2e-5, rtol=2e-5)


@settings(max_examples=20, deadline=None)
@given(requests, st.integers(0, 2**31))
def test_a_quantised_cache_gives_what_its_values_say(
    lengths: list[tuple[int, int]], seed: int
) -> None:
    call = Call(lengths, kv_dtype=E4M3, seed=seed, lens=(1, 2, 4, 7, 12))  # q stays as it is
    torch.testing.assert_close(call.run(), call.reference(), atol=2e-5, rtol=2e-5)


def test_prefill_over_a_quantised_cache_rounds_q_only() -> None:
    call = Call([(6, 20), (9, 9)], kv_dtype=E4M3, lens=(1,))
    out = call.run()
    call.q = quantize(call.q, 1.0).float()
    torch.testing.assert_close(out, call.reference(), atol=2e-5, rtol=2e-5)


def test_values_beyond_e4m3_become_its_largest() -> None:
    stored = quantize(torch.tensor([1e6, -1e6, 3.0, float("nan")]), 0.5).float()
    assert stored[:3].tolist() == [448.0, -448.0, 6.0]
    assert stored[3].isnan()


def test_the_second_layer_is_checked_again() -> None:
    call = Call(LENGTHS)
    layers = make_layers(call.spec, [call.pool, call.pool], [call.scales] * 2, FakeKernels())
    layers(0)(call.q, call.k, call.v, call.metadata)
    with pytest.raises(ContractViolation, match=r"layer 1: q shape is \(12, 4, 8\), .*\(16, 4, 8"):
        layers(1)(call.q[:12], call.k, call.v, call.metadata)


META = torch.device("meta")
ARGUMENTS: list[tuple[str, Callable[[Tensor], Tensor], tuple[str, str]]] = [
    ("q", lambda x: x[:12], ("q shape is (12, 4, 8)", "(16, 4, 8)")),
    ("q", lambda x: torch.cat([x, x[:2]]), ("q shape is (18, 4, 8)", "(16, 4, 8)")),
    ("q", lambda x: x[:, :2], ("q shape is (16, 2, 8)", "(16, 4, 8)")),
    ("q", lambda x: x[..., :4], ("q shape is (16, 4, 4)", "(16, 4, 8)")),
    ("q", lambda x: x.flatten(1), ("q shape is (16, 32)", "(16, 4, 8)")),
    ("q", lambda x: x.bfloat16(), ("q dtype is torch.bfloat16", "torch.float32")),
    ("q", lambda x: x.to(META), ("q device is meta", "cpu")),
    ("k", lambda x: x[1:], ("k shape is (15, 2, 8)", "(16, 2, 8)")),
    ("k", lambda x: x[:, :1], ("k shape is (16, 1, 8)", "(16, 2, 8)")),
    ("k", lambda x: x.half(), ("k dtype is torch.float16", "torch.float32")),
    ("k", lambda x: x.to(E4M3), ("k dtype is torch.float8_e4m3fn", "torch.float32")),
    ("k", lambda x: x.to(META), ("k device is meta", "cpu")),
    ("v", lambda x: x[1:], ("v shape is (15, 2, 8)", "(16, 2, 8)")),
    ("v", lambda x: x[..., :4], ("v shape is (16, 2, 4)", "(16, 2, 8)")),
    ("v", lambda x: x.double(), ("v dtype is torch.float64", "torch.float32")),
    ("v", lambda x: x.to(META), ("v device is meta", "cpu")),
]


@pytest.mark.parametrize(("name", "change", "numbers"), ARGUMENTS)
def test_wrong_rows_are_refused(
    name: str, change: Callable[[Tensor], Tensor], numbers: tuple[str, str]
) -> None:
    call = Call(LENGTHS)
    call.refused(numbers, **{name: change(getattr(call, name))})


def unrotated(call: Call, normed: bool = True) -> dict[str, Any]:
    """Rows of qkv for the call, the norm's weight (or None) and angles."""
    torch.manual_seed(1)
    qkv, weight = torch.randn(ROWS, HEADS + 2 * KV_HEADS, DIM), torch.rand(HEADS + KV_HEADS, DIM)
    angles = torch.rand(ROWS, 1, DIM // 2)
    parts = {"qkv": qkv, "cos": angles.cos(), "sin": angles.sin()}
    return {**parts, "norm_weight": weight if normed else None, "metadata": call.metadata}


def attend_qkv(backend: Any, given: dict[str, Any]) -> Tensor:
    rotation = QkNormRope(given["norm_weight"], 1e-6, given["cos"], given["sin"])
    out: Tensor = backend.attend_qkv(given["qkv"], rotation, given["metadata"])
    return out


UNROTATED: list[tuple[str, Callable[[Tensor], Tensor], tuple[str, str]]] = [
    ("qkv", lambda x: x[:12], ("qkv shape is (12, 8, 8)", "(16, 8, 8)")),
    ("qkv", lambda x: x[:, 1:], ("qkv shape is (16, 7, 8)", "(16, 8, 8)")),
    ("qkv", lambda x: x.bfloat16(), ("qkv dtype is torch.bfloat16", "torch.float32")),
    ("qkv", lambda x: x.to(META), ("qkv device is meta", "cpu")),
    ("cos", lambda x: x[:12], ("cos shape is (12, 1, 4)", "(16, 1, 4)")),
    ("sin", lambda x: x[..., :2], ("sin shape is (16, 1, 2)", "(16, 1, 4)")),
    ("sin", lambda x: x.bfloat16(), ("sin dtype is torch.bfloat16", "torch.float32")),
    ("norm_weight", lambda x: x[1:], ("norm_weight shape is (5, 8)", "(6, 8)")),
    ("norm_weight", lambda x: x.double(), ("norm_weight dtype is torch.float64", "torch.float32")),
    ("norm_weight", lambda x: x.to(META), ("norm_weight device is meta", "cpu")),
]


@pytest.mark.parametrize(("name", "change", "numbers"), UNROTATED)
def test_wrong_unrotated_rows_are_refused(
    name: str, change: Callable[[Tensor], Tensor], numbers: tuple[str, str]
) -> None:
    call = Call(LENGTHS)
    backend, given = call.backend(), unrotated(call)
    with pytest.raises(ContractViolation) as caught:
        attend_qkv(backend, {**given, name: change(given[name])})
    assert str(caught.value).startswith(WHERE)
    assert all(number in str(caught.value) for number in numbers), caught.value
    assert torch.equal(backend.pool, call.pool)


def test_unrotated_rows_are_checked_in_every_layer() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    call = Call(LENGTHS)
    layers = make_layers(call.spec, [call.pool, call.pool], [call.scales] * 2, FakeKernels())
    given = unrotated(call)
    attend_qkv(layers(0), given)
    with pytest.raises(ContractViolation, match=r"layer 1: cos shape is \(15, 1, 4\), "):
        attend_qkv(layers(1), {**given, "cos": given["cos"][1:]})


@pytest.mark.parametrize("kv_dtype", [FP32, E4M3], ids=str)
@pytest.mark.parametrize("name", ["kernels", "torch_ref"])
@pytest.mark.parametrize("normed", [True, False])
def test_unrotated_rows_give_what_rotated_ones_give(
    normed: bool, name: str, kv_dtype: torch.dtype
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    call = Call(LENGTHS, kv_dtype=kv_dtype, lens=(1, 4, 6))
    given = unrotated(call, normed)
    qk, call.v = given["qkv"].tensor_split([HEADS + KV_HEADS], 1)
    qk = RMSNorm(given["norm_weight"], 1e-6)(qk) if normed else qk
    call.q, call.k = rotate(qk, (given["cos"], given["sin"])).tensor_split([HEADS], 1)
    torch_ref = make_backend("torch_ref", call.spec, [call.pool.clone()], [call.scales])
    out = attend_qkv(call.backend() if name == "kernels" else torch_ref(0), given)
    torch.testing.assert_close(out, call.reference(), atol=2e-5, rtol=2e-5)


def strided(x: Tensor) -> Tensor:
    """The same values, every second of an allocation."""
    return torch.stack([x, x], -1)[..., 0]


METADATA: dict[str, list[tuple[Callable[[Any], Any], tuple[str, str]]]] = {
    "cu_seqlens_q": [
        (lambda x: x[:-1], ("cu_seqlens_q shape is (5,)", "(6,)")),
        (lambda x: x.long(), ("cu_seqlens_q dtype is torch.int64", "torch.int32")),
        (lambda x: x.to(META), ("cu_seqlens_q device is meta", "cpu")),
        (strided, ("cu_seqlens_q contiguity is False", "True")),
    ],
    "seq_lens": [
        (lambda x: x[:-1], ("seq_lens shape is (4,)", "(5,)")),
        (lambda x: torch.cat([x, x[:2]]), ("seq_lens shape is (7,)", "(5,)")),
        (lambda x: x.long(), ("seq_lens dtype is torch.int64", "torch.int32")),
        (lambda x: x.to(META), ("seq_lens device is meta", "cpu")),
        (strided, ("seq_lens contiguity is False", "True")),
    ],
    "page_table": [
        (lambda x: x[:-1], ("page_table shape is (4, 3)", "(5, 3)")),
        (lambda x: x[:, :2], ("page_table shape is (5, 2)", "(5, 3)")),
        (lambda x: x.long(), ("page_table dtype is torch.int64", "torch.int32")),
        (lambda x: x.to(META), ("page_table device is meta", "cpu")),
        (strided, ("page_table contiguity is False", "True")),
    ],
    "slot_mapping": [
        (lambda x: x[:-1], ("slot_mapping shape is (15,)", "(16,)")),
        (lambda x: x.long(), ("slot_mapping dtype is torch.int64", "torch.int32")),
        (lambda x: x.to(META), ("slot_mapping device is meta", "cpu")),
        (strided, ("slot_mapping contiguity is False", "True")),
    ],
    "query_lens_host": [
        (lambda x: x[:-1], ("seq_lens_host rows is 5", "4")),
        (lambda x: x + 1, ("slot_mapping shape is (16,)", "(21,)")),
    ],
    "seq_lens_host": [(lambda x: x[:-1], ("seq_lens_host rows is 4", "5"))],
    "page_table_host": [
        (lambda x: x[:-1], ("page_table_host rows is 4", "5")),
        (lambda x: x[:, :2], ("page_table shape is (5, 3)", "(5, 2)")),
    ],
}


def test_every_field_of_the_metadata_is_mutated_below() -> None:
    assert set(METADATA) == {item.name for item in fields(AttentionMetadata)} - {"place"}


@pytest.mark.parametrize(
    ("name", "change", "numbers"),
    [(name, *case) for name, cases in METADATA.items() for case in cases],
)
def test_wrong_metadata_is_refused(
    name: str, change: Callable[[Any], Any], numbers: tuple[str, str]
) -> None:
    call = Call(LENGTHS)
    wrong = replace(call.metadata, **{name: change(getattr(call.metadata, name))})
    call.refused(numbers, metadata=wrong)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "seq_lens", "page_table", "slot_mapping"])
def test_wrong_values_on_the_device_are_refused_when_they_are_read_back(name: str) -> None:
    call = Call(LENGTHS, check_device_values=True)
    tensor = getattr(call.metadata, name).clone()
    at = tuple(0 if n == 0 else size - 1 for n, size in enumerate(tensor.shape))
    due = int(tensor[at])
    tensor[at] = due + 1
    index = ", ".join(map(str, at))
    numbers = (f"{name}[{index}] on the device is {due + 1}", f"the pool say {due}")
    call.refused(numbers, metadata=replace(call.metadata, **{name: tensor}))


class Planned:
    """A planner that returns a plan made elsewhere."""

    def __init__(self, plan: KernelPlan) -> None:
        self._plan = plan

    def plan(self, metadata: AttentionMetadata) -> KernelPlan:
        return self._plan


def run_with(call: Call, plan: KernelPlan) -> tuple[ContractViolation, Tensor, Tensor]:
    backend = replace(call.backend(), planner=Planned(plan))
    before = backend.pool.clone()
    with pytest.raises(ContractViolation) as caught:
        backend(call.q, call.k, call.v, call.metadata)
    return caught.value, before, backend.pool


def members(*numbers: int) -> Callable[[Any], Any]:
    return lambda x: np.array(numbers)


# of the second group of LENGTHS: requests 1 and 4, verifications of 4 tokens, rows 1..4 and 12..15
GROUP: dict[str, list[tuple[Callable[[Any], Any], tuple[str, str]]]] = {
    "members": [(members(1), ("requests of all groups is [0, 1, 2, 3]", "[0, 1, 2, 3, 4]")),
                (members(0, 4), ("[0, 0, 2, 3, 4]", "[0, 1, 2, 3, 4]"))],
    "rows": [(lambda x: x[:-1], ("rows of a group is 7", "8")),
             (lambda x: slice(1, 5), ("rows of a group is 4", "8"))],
    "num_rows": [(lambda x: 12, ("num_rows of a group is 12", "8"))],
    "query_len": [(lambda x: 3, ("query_len of a group is [3, 3]", "[4, 4]")),
                  (lambda x: None, ("mask shape of a group is (2, 4, 2)", "None"))],
    "cu_seqlens_q": [(lambda x: x[:-1], ("cu_seqlens_q of a group shape is (2,)", "(3,)")),
                     (lambda x: x.long(), ("dtype is torch.int64", "torch.int32"))],
    "cu_seqlens_kv": [(lambda x: x[:-1], ("cu_seqlens_kv of a group shape is (2,)", "(3,)")),
                      (lambda x: x.to(META), ("device is meta", "cpu"))],
    "seq_lens": [(lambda x: x[:1], ("seq_lens of a group shape is (1,)", "(2,)")),
                 (strided, ("seq_lens of a group contiguity is False", "True"))],
    "page_table": [(lambda x: x[:1], ("page_table of a group shape is (1, 3)", "(2, 3)")),
                   (lambda x: x[:, :2], ("(2, 2)", "(2, 3)")),
                   (lambda x: x.long(), ("dtype is torch.int64", "torch.int32")),
                   (strided, ("page_table of a group contiguity is False", "True"))],
    "max_query_len": [(lambda x: 5, ("max_query_len of a group is 5", "4"))],
    "max_seq_len": [(lambda x: 11, ("max_seq_len of a group is 11", "12"))],
    "mask": [(lambda x: x[:1], ("mask shape of a group is (1, 4, 2)", "(2, 4, 2)")),
             (lambda x: x[..., :1], ("mask shape of a group is (2, 4, 1)", "(2, 4, 2)")),
             (lambda x: None, ("mask shape of a group is None", "(2, 4, 2)")),
             (lambda x: x.int(), ("mask of a group dtype is torch.int32", "torch.uint16"))],
}  # fmt: skip


def test_every_field_of_a_group_is_mutated_below() -> None:
    assert set(GROUP) == {item.name for item in fields(KernelGroup)}


@pytest.mark.parametrize(
    ("name", "change", "numbers"),
    [(name, *case) for name, cases in GROUP.items() for case in cases],
)
def test_a_wrong_group_is_refused(
    name: str, change: Callable[[Any], Any], numbers: tuple[str, str]
) -> None:
    call = Call(LENGTHS)
    plan = call.backend().planner.plan(call.metadata)
    decode, verify, prefill = plan.groups
    wrong = replace(verify, **{name: change(getattr(verify, name))})
    error, before, after = run_with(call, replace(plan, groups=(decode, wrong, prefill)))
    assert str(error).startswith(WHERE)
    assert all(number in str(error) for number in numbers), error
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "name", ["rows", "cu_seqlens_q", "cu_seqlens_kv", "seq_lens", "page_table", "mask"]
)
def test_wrong_values_of_a_group_are_refused_when_they_are_read_back(name: str) -> None:
    call = Call(LENGTHS, check_device_values=True)
    plan = call.backend().planner.plan(call.metadata)
    decode, verify, prefill = plan.groups
    tensor = getattr(verify, name).clone()
    at = (0,) * tensor.ndim
    due = int(tensor[at])
    tensor[at] = torch.tensor(due + 1, dtype=tensor.dtype)
    wrong = replace(verify, **{name: tensor})
    error, _, _ = run_with(call, replace(plan, groups=(decode, wrong, prefill)))
    assert f"on the device is {due + 1}, " in str(error)
    assert str(error).endswith(f"say {due}")


def test_wrong_cache_slots_are_refused() -> None:
    call = Call(LENGTHS, check_device_values=True)
    plan = call.backend().planner.plan(call.metadata)
    mapping = plan.slots.mapping
    first = int(mapping[0])
    for slots, numbers in [
        (CacheSlots(mapping[:-1], PAGE), ("slots.mapping shape is (15,)", "(16,)")),
        (CacheSlots(mapping.long(), PAGE), ("slots.mapping dtype is torch.int64", "torch.int32")),
        (CacheSlots(mapping + 1, PAGE), (f"mapping[0] on the device is {first + 1}", f"{first}")),
        (CacheSlots(mapping, 2 * PAGE), (f"slots.page_size is {2 * PAGE}", f"{PAGE}")),
    ]:
        wrong = replace(plan, slots=slots)
        error, before, after = run_with(call, wrong)
        assert all(number in str(error) for number in numbers), error
        assert torch.equal(before, after)


def test_a_kernel_gets_q_in_the_dtype_it_takes() -> None:
    """Prefill takes the pool's dtype from q: anything else reads the pool with wrong strides."""
    from dp_runtime.attention.kernel_contract import check_kernel

    call = Call([(6, 20)], kv_dtype=E4M3, lens=(1,))
    backend = call.backend()
    (group,) = backend.planner.plan(call.metadata).groups
    out = torch.empty_like(call.q)
    check_kernel(backend.contract, quantize(call.q, 1.0), out, group, call.metadata)
    for q, wrong_out, words in [
        (call.q, out, ("q dtype is torch.float32", "torch.float8_e4m3fn")),
        (quantize(call.q, 1.0)[:4], out, ("q shape is (4, 4, 8)", "(6, 4, 8)")),
        (strided(quantize(call.q, 1.0)), out, ("q contiguity is False", "True")),
        (quantize(call.q, 1.0), out[:4], ("out shape is (4, 4, 8)", "(6, 4, 8)")),
        (quantize(call.q, 1.0), out.bfloat16(), ("out dtype is torch.bfloat16", "torch.float32")),
    ]:
        with pytest.raises(ContractViolation) as caught:
            check_kernel(backend.contract, q, wrong_out, group, call.metadata)
        assert str(caught.value).startswith(WHERE + "a kernel's " + words[0])
        assert words[1] in str(caught.value)
