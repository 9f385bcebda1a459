"""GPU attention backends against the float32 torch reference, over the same paged cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dp_runtime.attention.kv_writer import KvWriter
from dp_runtime.attention.registry import backend_class, choose_backend
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.attention.trtllm.kernel_groups import build_groups
from dp_runtime.core.attention_metadata import AttentionMetadata, PageGeometry
from dp_runtime.core.batch import LocalBatch
from dp_runtime.core.e4m3 import quantize
from dp_runtime.core.qk_norm_rope import QkNormRope
from dp_runtime.errors import ContractViolation
from tests.dp_runtime.paged import attend
from tests.gpu.build import build_all
from tests.gpu.cases import (
    CUDA,
    PLACE,
    Case,
    Lengths,
    lengths_of,
    relative_error,
    whole_lengths,
    with_null_rows,
    with_poisoned_tails,
)

pytestmark = pytest.mark.timeout(580)  # the first test waits for the compilers

BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
TOLERANCE = {BF16: 1e-2, FP16: 2e-2, E4M3: 5e-2}  # by the cache's dtype


def shape(
    heads: int, kv_heads: int, dim: int, page: int = 64, dtype: torch.dtype = BF16,
    kv: torch.dtype | None = None, lens: tuple[int, ...] = (1, 4),
) -> AttentionSpec:  # fmt: skip
    return AttentionSpec(heads, kv_heads, dim, page, dtype, kv or dtype, frozenset(lens))


QWEN3 = shape(32, 4, 128)
SHAPES = {"d128r8": QWEN3, "d256r8": shape(16, 2, 256), "d256r16": shape(32, 2, 256)}
NAMES = pytest.mark.parametrize("name", ["trtllm", "flashinfer"])
GRID = pytest.mark.parametrize("spec", list(SHAPES.values()), ids=list(SHAPES))
ONE_SHAPE = pytest.mark.parametrize("spec", [QWEN3], ids=["d128r8"])
BATCHES = (1, 10, 12, 64, 256)


@pytest.fixture(scope="session", autouse=True)
def modules(request: pytest.FixtureRequest) -> None:
    """All modules that the tests chosen from this file need, compiled side by side."""
    items = (item for item in request.session.items if item.path == Path(__file__))
    calls = [item.callspec.params for item in items if hasattr(item, "callspec")]
    build_all([(call["name"], call["spec"]) for call in calls if "spec" in call], CUDA)


def check(lengths: Lengths, spec: AttentionSpec, name: str) -> None:
    case = Case.make(lengths, spec)
    out = case.run(name)
    assert out.dtype == spec.dtype
    assert out.isfinite().all()
    assert relative_error(out, case.reference()) < TOLERANCE[spec.kv_dtype]


@NAMES
@GRID
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("query_len", [1, 4], ids=["decode", "verify"])
def test_decode_and_verification(
    name: str, spec: AttentionSpec, batch: int, query_len: int
) -> None:
    check(lengths_of(batch, query_len), spec, name)


@NAMES
@GRID
@pytest.mark.parametrize("query_len", [1, 4], ids=["decode", "verify"])
def test_every_length_alone(name: str, spec: AttentionSpec, query_len: int) -> None:
    for length in lengths_of(23, query_len):
        check([length], spec, name)


@NAMES
@GRID
@pytest.mark.parametrize("batch", BATCHES)
def test_prefill(name: str, spec: AttentionSpec, batch: int) -> None:
    """Whole prompts; 256 of them up to 2048 tokens, for a slot holds no more rows."""
    check(whole_lengths(batch, 8192 if batch <= 64 else 2048), spec, name)


@NAMES
@GRID
@pytest.mark.parametrize("length", [64, 65, 8192])
def test_a_long_or_odd_prompt_alone(name: str, spec: AttentionSpec, length: int) -> None:
    check([(length, length)], spec, name)


@NAMES
@GRID
@pytest.mark.parametrize("batch", BATCHES)
def test_chunks(name: str, spec: AttentionSpec, batch: int) -> None:
    check(lengths_of(batch, 17), spec, name)
    check(lengths_of(min(batch, 64), 512), spec, name)


@NAMES
@ONE_SHAPE
def test_all_kinds_in_any_order_share_a_slot(name: str, spec: AttentionSpec) -> None:
    lengths = [(1, 70), (30, 30), (4, 68), (1, 1), (5, 69), (1, 500), (200, 700), (4, 4), (1, 64)]
    check(lengths, spec, name)


MIXED = [(1, 1), (1, 500), (1, 129), (70, 70), (33, 600), (1, 64), (257, 1025)]
SINGLES = {
    "page16": shape(32, 4, 128, page=16, lens=(1,)),
    "page32": shape(32, 4, 128, page=32, lens=(1,)),
    "page128": shape(32, 4, 128, page=128, lens=(1,)),
    "d64": shape(32, 4, 64, lens=(1,)),
    "fp16": shape(32, 4, 128, dtype=FP16, lens=(1,)),
}


@NAMES
@pytest.mark.parametrize("spec", list(SINGLES.values()), ids=list(SINGLES))
def test_other_pages_sizes_and_dtypes(name: str, spec: AttentionSpec) -> None:
    check(MIXED, spec, name)


@NAMES
@pytest.mark.parametrize("query_len", [2, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("spec", [shape(32, 4, 128, lens=(2, 3, 5, 6, 7, 8))], ids=["d128r8"])
def test_other_verification_lengths(name: str, spec: AttentionSpec, query_len: int) -> None:
    check(lengths_of(12, query_len), spec, name)


@NAMES
@pytest.mark.parametrize("query_len", [1, 4, 8, 40], ids=["decode", "verify4", "verify8", "chunk"])
@pytest.mark.parametrize("spec", [shape(32, 4, 128, kv=E4M3, lens=(1, 4, 8))], ids=["e4m3"])
def test_quantised_cache(name: str, spec: AttentionSpec, query_len: int) -> None:
    check(lengths_of(12, query_len), spec, name)


UNROTATED = {
    "bf16": shape(32, 4, 128),
    "fp16": SINGLES["fp16"],
    "e4m3": shape(32, 4, 128, kv=E4M3, lens=(1, 4, 8)),
    "d64": SINGLES["d64"],
    "d256": SHAPES["d256r8"],
}


@pytest.mark.parametrize("name", ["trtllm", "flashinfer", "torch_ref"])
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize("spec", list(UNROTATED.values()), ids=list(UNROTATED))
def test_unrotated_rows_give_what_rotated_ones_give(
    name: str, spec: AttentionSpec, normed: bool
) -> None:
    """The fused kernel rounds a rotation once, the plain layers each of its products."""
    case = Case.make(MIXED, spec)
    rows, half = len(case.q), spec.head_dim // 2
    angles = torch.rand(rows, 1, half, device=CUDA) * 6
    heads = spec.num_heads + spec.num_kv_heads
    weight = torch.rand(heads, spec.head_dim, device=CUDA, dtype=spec.dtype) if normed else None
    rotation = QkNormRope(weight, 1e-6, angles.cos().to(spec.dtype), angles.sin().to(spec.dtype))
    out, pool = case.run_unrotated(name, rotation)
    rotated = case.rotated(rotation)
    slots = case.metadata.slot_mapping.long()
    page, offset = slots // spec.page_size, slots % spec.page_size
    as_values = pool.float()
    v = quantize(case.v, case.scales.v) if spec.quantized else case.v
    k = quantize(rotated.k, case.scales.k) if spec.quantized else rotated.k
    error = relative_error(as_values[page, 1, :, offset], v.float())
    assert error < (1e-3 if spec.quantized else 1e-9), "a value may tie where its scale rounds"
    k_error = relative_error(as_values[page, 0, :, offset], k.float())
    assert k_error < TOLERANCE[spec.kv_dtype]
    as_values[page, :, :, offset] = case.pool.float()[page, :, :, offset]
    assert torch.equal(as_values, case.pool.float()), "no other slot was written"
    assert relative_error(out, rotated.reference()) < TOLERANCE[spec.kv_dtype]


@NAMES
@ONE_SHAPE
def test_zero_rows_call_no_kernel(name: str, spec: AttentionSpec) -> None:
    case = Case.make([(1, 9)], spec)
    backend = backend_class(name)(spec, [case.pool])
    pages = PageGeometry(case.num_pages, spec.page_size)
    metadata = AttentionMetadata.build(LocalBatch.empty(), pages, PLACE, CUDA)
    assert attend(backend, case.q[:0], case.k[:0], case.v[:0], metadata).shape == (0, 32, 128)
    angles = torch.zeros(0, 1, 64, dtype=spec.dtype, device=CUDA)
    qkv = torch.cat([case.q, case.k, case.v], 1)[:0]
    rotation = QkNormRope(None, 0.0, angles, angles)
    plan, paged = backend.plan(metadata), backend.layer(0)
    q = KvWriter(paged.cache).write(qkv, rotation, plan)
    assert paged.run(q, plan).shape == (0, 32, 128)


@NAMES
@ONE_SHAPE
@pytest.mark.parametrize("count", [1, 2, 16, 31])
@pytest.mark.parametrize("query_len", [1, 4])
@pytest.mark.parametrize("real", [0, 1, 33], ids=["alone", "1 real", "33 real"])
def test_null_rows(name: str, spec: AttentionSpec, count: int, query_len: int, real: int) -> None:
    case = Case.make(lengths_of(real, query_len, 2048), spec)
    padded, metadata = with_null_rows(case, count, query_len)
    out = padded.run(name, metadata)
    assert out.isfinite().all()
    assert len(out) == (real + count) * query_len
    if real:
        rows = out[: case.batch.num_tokens]
        assert relative_error(rows, case.reference()) < TOLERANCE[spec.kv_dtype]


@NAMES
@ONE_SHAPE
def test_rows_beyond_the_metadata_are_refused(name: str, spec: AttentionSpec) -> None:
    """The call of SGLang PR #21649: 12 query rows, metadata of 10."""
    case, padded = (Case.make(lengths_of(n, 1, 1000), spec) for n in (10, 12))
    backend = backend_class(name)(spec, [case.pool])
    plan = backend.plan(case.metadata)
    with pytest.raises(ContractViolation) as error:
        backend.layer(0).run(padded.q, plan)
    text = str(error.value)
    assert "rank 0, step 3, pass target, layer 0: q shape is (12, 32, 128)" in text
    assert "(10, 32, 128)" in text


@NAMES
@ONE_SHAPE
def test_device_values_are_compared_if_asked_for(name: str, spec: AttentionSpec) -> None:
    spec = replace(spec, check_device_values=True)
    case = Case.make([(1, 70), (30, 100), (4, 9)], spec)
    clean, metadata = case.run(name), case.metadata
    assert clean.isfinite().all()
    metadata.seq_lens[1] += 1
    with pytest.raises(ContractViolation, match=r"seq_lens\[1\] on the device is 101, .* 100"):
        case.run(name, metadata)


@NAMES
@ONE_SHAPE
def test_pages_of_others_do_not_reach_a_result(name: str, spec: AttentionSpec) -> None:
    case = Case.make([(1, 70), (30, 100), (4, 80)], spec)
    clean = case.run(name)
    used = {int(page) for row in case.batch.page_table for page in row}
    for page in set(range(1, case.num_pages)) - used:
        case.pool[page] = float("nan")
    assert torch.equal(case.run(name), clean)


@ONE_SHAPE
@pytest.mark.parametrize("name", ["trtllm"])
def test_auto_prefers_the_trtllm_kernels_and_says_what_it_can_not(
    name: str, spec: AttentionSpec
) -> None:
    assert choose_backend("auto", spec, CUDA)[0] == name
    other, reason = choose_backend("auto", replace(spec, page_size=8), CUDA)
    assert other == "flashinfer"
    assert "not trtllm: page_size: 8 is not allowed" in reason
    with pytest.raises(ValueError, match=r"head_dim: 80 .* attention_backend=torch_ref"):
        choose_backend("trtllm", replace(spec, head_dim=80), CUDA)


def test_a_module_that_was_not_built_is_an_error_after_ready() -> None:
    code = (
        "import torch; from dp_runtime.attention.spec import AttentionSpec;"
        "from dp_runtime.attention.trtllm.backend import TrtllmBackend;"
        "from dp_runtime.kernels.jit_build import forbid_compilation; forbid_compilation();"
        "b = torch.bfloat16; spec = AttentionSpec(12, 4, 128, 64, b, b);"
        "TrtllmBackend.jit_modules(spec, torch.device('cuda', 0))[1].build()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingJITCacheError" in done.stderr


@NAMES
@ONE_SHAPE
@pytest.mark.parametrize("query_len", [1, 4, 40], ids=["decode", "verify", "chunk"])
def test_what_lies_behind_the_metadata_never_changes_a_result(
    name: str, spec: AttentionSpec, query_len: int
) -> None:
    """NaN rows, page ids outside the pool and huge lengths follow in the same allocations."""
    case = Case.make(lengths_of(10, query_len, 2048), spec)
    tailed, metadata = with_poisoned_tails(case, extra=64)
    assert torch.equal(tailed.run(name, metadata), case.run(name))


@ONE_SHAPE
@pytest.mark.parametrize("name", ["trtllm"])
@pytest.mark.parametrize("query_len", [1, 4, 40], ids=["decode", "verify", "chunk"])
def test_kernels_write_their_own_rows_only(name: str, spec: AttentionSpec, query_len: int) -> None:
    from dp_runtime.attention.trtllm.sm90 import make_calls

    case = Case.make(lengths_of(10, query_len, 2048), spec)
    (group,) = build_groups(case.metadata, spec.decode_query_lens)
    calls, rows = make_calls(spec, CUDA), len(case.q)
    out = torch.full((rows + 64, *case.q.shape[1:]), 7.0, dtype=BF16, device=CUDA)
    call = calls.prefill if group.query_len is None else calls.decode
    call(case.q, case.pool, case.scales, group, out[:rows])
    assert (out[rows:] == 7.0).all()
    assert not (out[:rows] == 7.0).all()


@pytest.mark.timeout(600)
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="no compute-sanitizer on PATH")
def test_memcheck_finds_nothing() -> None:
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    run = [*command, sys.executable, "-m", "tests.gpu.sanitize"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
