"""How a pass's requests are split over GPU kernels; runs without a GPU."""

import ast
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dp_runtime.attention
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.attention.trtllm.backend import TrtllmBackend
from dp_runtime.attention.trtllm.kernel_groups import build_groups, causal_mask
from dp_runtime.attention.trtllm.kernel_plan import KernelPlan
from tests.dp_runtime.fake_kernels import FakeKernels
from tests.dp_runtime.paged import metadata_of, paged_batch, random_page_table

PAGE = 4
requests = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 40)).map(lambda pair: (pair[0], sum(pair))),
    min_size=1,
    max_size=12,
)


def spec(decode: set[int]) -> AttentionSpec:
    dtype = torch.float32
    return AttentionSpec(4, 2, 8, PAGE, dtype, dtype, decode_query_lens=frozenset(decode))


@given(requests, st.sets(st.integers(1, 8), max_size=3))
def test_groups_cover_every_row_once_with_the_numbers_of_their_requests(
    lengths: list[tuple[int, int]], decode: set[int]
) -> None:
    table, num_pages = random_page_table([s for _, s in lengths], PAGE, np.random.default_rng(0))
    metadata = metadata_of(paged_batch(lengths, table, PAGE), num_pages, PAGE)
    groups = build_groups(metadata, frozenset(decode))
    every_row = torch.arange(metadata.num_tokens)
    assert torch.cat([every_row[group.rows] for group in groups]).sort().values.equal(every_row)
    for group in groups:
        assert group.num_rows == len(every_row[group.rows]) == int(group.cu_seqlens_q[-1])
        assert group.page_table.shape[0] == group.batch_size == len(group.cu_seqlens_kv) - 1
        assert group.cu_seqlens_kv.diff().tolist() == group.seq_lens.tolist()
        if group.query_len is None:
            assert not decode & set(group.cu_seqlens_q.diff().tolist())
        else:
            assert set(group.cu_seqlens_q.diff().tolist()) == {group.query_len}
            assert (group.mask is None) == (group.query_len == 1)


def test_a_plan_keeps_its_tensors_whatever_is_planned_later() -> None:
    """A captured graph reads its plan's tensors at every replay."""
    table, num_pages = random_page_table([9], PAGE, np.random.default_rng(0))
    pools = [torch.zeros(num_pages, 2, 2, PAGE, 8)]
    backend = TrtllmBackend(spec({1}), pools, calls=FakeKernels())
    first, second = (
        backend.plan(metadata_of(paged_batch([(1, length)], table, PAGE), num_pages, PAGE))
        for length in (9, 5)
    )
    assert isinstance(first, KernelPlan)
    assert isinstance(second, KernelPlan)
    assert [plan.groups[0].seq_lens.tolist() for plan in (first, second)] == [[9], [5]]
    assert first.groups[0].seq_lens.data_ptr() == first.metadata.seq_lens.data_ptr()


@pytest.mark.parametrize("query_len", [2, 4, 8, 17, 33])
def test_the_packed_mask_lets_a_row_see_the_new_tokens_up_to_itself(query_len: int) -> None:
    mask = causal_mask(3, query_len, torch.device("cpu"))
    assert mask.shape == (3, query_len, 2 if query_len <= 32 else 4)
    assert mask.dtype == torch.uint16
    for row in range(query_len):
        bits = sum(int(word) << (16 * i) for i, word in enumerate(mask[1, row].tolist()))
        assert bits == (1 << (row + 1)) - 1


ADAPTERS = ("trtllm/sm90", "trtllm/sm100", "flashinfer/wrappers")


def tree_of(module: str) -> ast.Module:
    """The source of a module of flashinfer; read, for importing it takes seconds and a GPU."""
    spec = find_spec("flashinfer")
    if spec is None or spec.origin is None:
        pytest.skip("flashinfer is not installed on this platform")
    path = Path(spec.origin).parent / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())


def adapter(name: str) -> ast.Module:
    return ast.parse((Path(dp_runtime.attention.__path__[0], f"{name}.py")).read_text())


def parameters(function: ast.FunctionDef) -> set[str]:
    arguments = function.args
    return {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_the_adapters_import_is_there(name: str) -> None:
    for node in ast.walk(adapter(name)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flashinfer"):
            module = (node.module or "").removeprefix("flashinfer").removeprefix(".")
            found = {
                getattr(item, "name", None) or getattr(item, "asname", None)
                for item in ast.walk(tree_of(module))
                if isinstance(item, ast.FunctionDef | ast.ClassDef | ast.alias)
            }
            assert {alias.name for alias in node.names} <= found


@pytest.mark.parametrize(
    ("name", "module", "function", "calls"),
    [
        ("trtllm/sm90", "prefill", "trtllm_fmha_v2_prefill", 1),
        ("trtllm/sm90", "decode", "trtllm_batch_decode_with_kv_cache", 1),
        ("trtllm/sm100", "prefill", "trtllm_batch_context_with_kv_cache", 1),
        ("trtllm/sm100", "decode", "trtllm_batch_decode_with_kv_cache", 1),
    ],
)
def test_the_adapters_use_argument_names_that_flashinfer_has(
    name: str, module: str, function: str, calls: int
) -> None:
    definitions = [node for node in tree_of(module).body
                   if isinstance(node, ast.FunctionDef) and node.name == function]  # fmt: skip
    assert definitions, f"flashinfer.{module} has no {function}"
    nodes = (node for node in ast.walk(adapter(name)) if isinstance(node, ast.Call))
    found = [node for node in nodes if getattr(node.func, "id", "") == function]
    assert len(found) == calls
    for call in found:
        assert {word.arg for word in call.keywords} <= parameters(definitions[-1])


@pytest.mark.parametrize(
    ("module", "function", "count"),
    [("xqa", "get_xqa_module", 8), ("prefill", "get_trtllm_fmha_v2_module", 3)],
)
def test_modules_are_built_with_as_many_arguments_as_flashinfer_takes(
    module: str, function: str, count: int
) -> None:
    """They are passed by position, as flashinfer's own calls do: its cache goes by that."""
    (definition,) = (node for node in tree_of(module).body
                     if isinstance(node, ast.FunctionDef) and node.name == function)  # fmt: skip
    arguments, defaults = definition.args.args, definition.args.defaults
    assert len(arguments) - len(defaults) <= count <= len(arguments)
