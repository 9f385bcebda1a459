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

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.attention.kv_writer import KvWriter
from dp_runtime.attention.plan import CacheSlots
from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.attention.torch_ref import TorchRefBackend
from dp_runtime.attention.trtllm.backend import TrtllmBackend
from dp_runtime.attention.trtllm.kernel_groups import KernelGroup
from dp_runtime.attention.trtllm.kernel_plan import KernelPlan
from dp_runtime.core.attention_metadata import AttentionMetadata, PageGeometry, Place
from dp_runtime.core.batch import LocalBatch
from dp_runtime.core.e4m3 import quantize
from dp_runtime.core.qk_norm_rope import QkNormRope, rotate
from dp_runtime.errors import ContractViolation
from dp_runtime.layers.norm import RMSNorm
from tests.dp_runtime.fake_kernels import FakeKernels
from tests.dp_runtime.paged import CPU, attend, paged_batch, random_page_table

FP32, BF16, E4M3 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
PAGE, HEADS, KV_HEADS, DIM = 4, 4, 2, 8
WHERE = "rank 5, step 7, pass target, layer 1: "
PLANNED = "rank 5, step 7, pass target, layers 0..1: "  # what is wrong for all layers alike
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

    def backend(self) -> TrtllmBackend:
        pools, scales = [self.pool.clone(), self.pool.clone()], [self.scales] * 2
        return TrtllmBackend(self.spec, pools, scales, FakeKernels())

    def plan(self, backend: TrtllmBackend | None = None) -> KernelPlan:
        plan = (backend or self.backend()).plan(self.metadata)
        assert isinstance(plan, KernelPlan)
        return plan

    def run(self) -> Tensor:
        return attend(self.backend(), self.q, self.k, self.v, self.metadata, layer=1)

    def reference(self) -> Tensor:
        backend = TorchRefBackend(self.spec, [self.pool.clone()], [self.scales])
        return attend(backend, self.q, self.k, self.v, self.metadata)

    def refused(self, numbers: tuple[str, ...], name: str, changed: Any) -> None:
        """The call that gets it refuses it, writes nothing, and the message has both numbers."""
        backend = self.backend()
        paged = backend.layer(1)
        before = paged.cache.pool.clone()

        def call(k: Tensor = self.k, v: Tensor = self.v, q: Tensor | None = None,
                 metadata: AttentionMetadata = self.metadata) -> None:  # fmt: skip
            plan = backend.plan(metadata)
            if q is not None:
                paged.run(q, plan)
            KvWriter(paged.cache).append(k, v, plan)

        with pytest.raises(ContractViolation) as caught:
            call(**{name: changed})
        text = str(caught.value)
        assert text.startswith(PLANNED if name == "metadata" else WHERE)
        assert all(number in text for number in numbers), text
        assert torch.equal(paged.cache.pool.view(torch.uint8), before.view(torch.uint8))


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
    backend = call.backend()
    plan = call.plan(backend)
    backend.layer(0).run(call.q, plan)
    with pytest.raises(ContractViolation, match=r"layer 1: q shape is \(12, 4, 8\), .*\(16, 4, 8"):
        backend.layer(1).run(call.q[:12], plan)


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
    call.refused(numbers, name, change(getattr(call, name)))


def unrotated(call: Call, normed: bool = True) -> dict[str, Any]:
    """Rows of qkv for the call, the norm's weight (or None) and angles."""
    torch.manual_seed(1)
    qkv, weight = torch.randn(ROWS, HEADS + 2 * KV_HEADS, DIM), torch.rand(HEADS + KV_HEADS, DIM)
    angles = torch.rand(ROWS, 1, DIM // 2)
    parts = {"qkv": qkv, "cos": angles.cos(), "sin": angles.sin()}
    return {**parts, "norm_weight": weight if normed else None, "metadata": call.metadata}


def write(backend: AttentionBackend, given: dict[str, Any], layer: int, plan: Any = None) -> Tensor:
    """The queries of unrotated rows, whose keys and values are written."""
    rotation = QkNormRope(given["norm_weight"], 1e-6, given["cos"], given["sin"])
    plan = plan or backend.plan(given["metadata"])
    return KvWriter(backend.layer(layer).cache).write(given["qkv"], rotation, plan)


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
        write(backend, {**given, name: change(given[name])}, 1)
    assert str(caught.value).startswith(WHERE)
    assert all(number in str(caught.value) for number in numbers), caught.value
    assert torch.equal(backend.layer(1).cache.pool, call.pool)


def test_unrotated_rows_are_checked_in_every_layer() -> None:
    call = Call(LENGTHS)
    backend, given = call.backend(), unrotated(call)
    plan = call.plan(backend)
    write(backend, given, 0, plan)
    with pytest.raises(ContractViolation, match=r"layer 1: cos shape is \(15, 1, 4\), "):
        write(backend, {**given, "cos": given["cos"][1:]}, 1, plan)


@pytest.mark.parametrize("kv_dtype", [FP32, E4M3], ids=str)
@pytest.mark.parametrize("name", ["kernels", "torch_ref"])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("writes", ["torch", "fused"])
def test_unrotated_rows_give_what_rotated_ones_give(
    writes: str, normed: bool, name: str, kv_dtype: torch.dtype
) -> None:
    if writes == "fused":
        pytest.importorskip("triton", reason="triton is not installed")
    call = Call(LENGTHS, kv_dtype=kv_dtype, lens=(1, 4, 6))
    given = unrotated(call, normed)
    qk, call.v = given["qkv"].tensor_split([HEADS + KV_HEADS], 1)
    qk = RMSNorm(given["norm_weight"], 1e-6)(qk) if normed else qk
    call.q, call.k = rotate(qk, (given["cos"], given["sin"])).tensor_split([HEADS], 1)
    torch_ref = TorchRefBackend(call.spec, [call.pool.clone()], [call.scales])
    backend = call.backend() if name == "kernels" else torch_ref
    plan, paged = backend.plan(call.metadata), backend.layer(0)
    rotation = QkNormRope(given["norm_weight"], 1e-6, given["cos"], given["sin"])
    writer = KvWriter(paged.cache)
    q = (writer.write_fused if writes == "fused" else writer.write)(given["qkv"], rotation, plan)
    torch.testing.assert_close(paged.run(q, plan), call.reference(), atol=2e-5, rtol=2e-5)


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
    call.refused(numbers, "metadata", wrong)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "seq_lens", "page_table", "slot_mapping"])
def test_wrong_values_on_the_device_are_refused_when_they_are_read_back(name: str) -> None:
    call = Call(LENGTHS, check_device_values=True)
    tensor = getattr(call.metadata, name).clone()
    at = tuple(0 if n == 0 else size - 1 for n, size in enumerate(tensor.shape))
    due = int(tensor[at])
    tensor[at] = due + 1
    index = ", ".join(map(str, at))
    numbers = (f"{name}[{index}] on the device is {due + 1}", f"the pool say {due}")
    call.refused(numbers, "metadata", replace(call.metadata, **{name: tensor}))


class Planned(TrtllmBackend):
    """A backend that is given its plan."""

    given: KernelPlan

    def _plan(self, metadata: AttentionMetadata) -> KernelPlan:
        return self.given


def refused_plan(call: Call, plan: KernelPlan) -> str:
    """What the backend says of a plan that it refuses for all layers."""
    backend = Planned(call.spec, [call.pool] * 2, [call.scales] * 2, FakeKernels())
    backend.given = plan
    with pytest.raises(ContractViolation) as caught:
        backend.plan(call.metadata)
    assert str(caught.value).startswith(PLANNED)
    return str(caught.value)


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
    plan = call.plan()
    decode, verify, prefill = plan.groups
    wrong = replace(verify, **{name: change(getattr(verify, name))})
    error = refused_plan(call, replace(plan, groups=(decode, wrong, prefill)))
    assert all(number in error for number in numbers), error


@pytest.mark.parametrize(
    "name", ["rows", "cu_seqlens_q", "cu_seqlens_kv", "seq_lens", "page_table", "mask"]
)
def test_wrong_values_of_a_group_are_refused_when_they_are_read_back(name: str) -> None:
    call = Call(LENGTHS, check_device_values=True)
    plan = call.plan()
    decode, verify, prefill = plan.groups
    tensor = getattr(verify, name).clone()
    at = (0,) * tensor.ndim
    due = int(tensor[at])
    tensor[at] = torch.tensor(due + 1, dtype=tensor.dtype)
    wrong = replace(verify, **{name: tensor})
    error = refused_plan(call, replace(plan, groups=(decode, wrong, prefill)))
    assert f"on the device is {due + 1}, " in error
    assert error.endswith(f"say {due}")


def test_wrong_cache_slots_are_refused() -> None:
    call = Call(LENGTHS, check_device_values=True)
    plan = call.plan()
    mapping = plan.slots.mapping
    first = int(mapping[0])
    for slots, numbers in [
        (CacheSlots(mapping[:-1], PAGE), ("slots.mapping shape is (15,)", "(16,)")),
        (CacheSlots(mapping.long(), PAGE), ("slots.mapping dtype is torch.int64", "torch.int32")),
        (CacheSlots(mapping + 1, PAGE), (f"mapping[0] on the device is {first + 1}", f"{first}")),
        (CacheSlots(mapping, 2 * PAGE), (f"slots.page_size is {2 * PAGE}", f"{PAGE}")),
    ]:
        error = refused_plan(call, replace(plan, slots=slots))
        assert all(number in error for number in numbers), error


def test_a_kernel_gets_q_in_the_dtype_it_takes() -> None:
    """Prefill takes the pool's dtype from q: anything else reads the pool with wrong strides."""
    call = Call([(6, 20)], kv_dtype=E4M3, lens=(1,))
    backend = call.backend()
    plan, cache = call.plan(backend), backend.layer(1).cache
    (group,) = plan.groups
    out = torch.empty_like(call.q)
    plan.check_call(quantize(call.q, 1.0), out, group, cache)
    for q, wrong_out, words in [
        (call.q, out, ("q dtype is torch.float32", "torch.float8_e4m3fn")),
        (quantize(call.q, 1.0)[:4], out, ("q shape is (4, 4, 8)", "(6, 4, 8)")),
        (strided(quantize(call.q, 1.0)), out, ("q contiguity is False", "True")),
        (quantize(call.q, 1.0), out[:4], ("out shape is (4, 4, 8)", "(6, 4, 8)")),
        (quantize(call.q, 1.0), out.bfloat16(), ("out dtype is torch.bfloat16", "torch.float32")),
    ]:
        with pytest.raises(ContractViolation) as caught:
            plan.check_call(q, wrong_out, group, cache)
        assert str(caught.value).startswith(WHERE + "a kernel's " + words[0])
        assert words[1] in str(caught.value)


def test_a_pass_without_rows_is_planned_and_calls_no_kernel() -> None:
    call = Call(LENGTHS)
    call.metadata = AttentionMetadata.build(
        LocalBatch.empty(), PageGeometry(4, PAGE), call.metadata.place, CPU
    )
    call.q, call.k, call.v = call.q[:0], call.k[:0], call.v[:0]
    assert call.run().shape == (0, HEADS, DIM)
    with pytest.raises(ContractViolation, match=r"layer 1: q shape is \(1, 4, 8\), .*\(0, 4, 8\)"):
        call.backend().layer(1).run(torch.zeros(1, HEADS, DIM), call.backend().plan(call.metadata))
