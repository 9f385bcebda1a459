"""Matrices that were measured: which product of theirs is by which kernel, and what is built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime import EngineConfig
from dp_runtime.kernels.dense_linear import measured, run
from dp_runtime.kernels.dense_linear.measured import FewRowsTiles, MeasuredProduct
from dp_runtime.kernels.dense_linear.tiles import DenseTile
from dp_runtime.layers.linear import FewRowsLinear, Linear, load_projection
from dp_runtime.models.registry import read_model_config
from dp_runtime.startup.execution_choices import choose_dense
from dp_runtime.startup.jit_modules import few_rows_jit_module
from dp_runtime.startup.rank_plan import plan_rank
from dp_runtime.weights.dummy import DummyWeights, MetaWeights
from tests.dp_runtime.paged import CPU
from tests.dp_runtime.startup.test_jit_modules import TINY_MOE, Recorder

BF16, GPU = torch.bfloat16, torch.device("cuda")
NARROW, WIDE = DenseTile(16, 64, 64, 2, 4, 3), DenseTile(32, 64, 64, 1, 4, 3)
OUTPUTS, INPUTS = 150, 272
SIZES = {"model.a": 100, "model.b": 50}
TIMES = (
    MeasuredProduct(OUTPUTS, INPUTS, NARROW, ((1, 9.0, 6.0), (16, 9.0, 7.0))),
    MeasuredProduct(OUTPUTS, INPUTS, WIDE, ((32, 9.0, 8.8), (40, 9.0, 8.0), (64, 12.0, 10.0))),
)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MEASURED", TIMES)


def load(few_rows: bool = True, inputs: int = INPUTS, bias: bool = False) -> Any:
    source = DummyWeights(0, CPU, torch.float32, few_rows_kernel=few_rows)
    return load_projection(source, SIZES, inputs, bias)


def test_rows_get_what_was_faster_for_fewer_and_for_more() -> None:
    tiles = FewRowsTiles.of(OUTPUTS, INPUTS)
    found = {rows: tiles.choose(rows) for rows in (0, 1, 2, 16, 17, 32, 39, 40, 41, 64, 65)}
    assert [rows for rows, tile in found.items() if tile == NARROW] == [0, 1, 2, 16]
    assert [rows for rows, tile in found.items() if tile == WIDE] == [40, 41, 64]
    assert {found[rows] for rows in (17, 32, 39, 65)} == {None}
    assert tiles.tiles == (NARROW, WIDE)
    assert tiles.sum_bytes(1) == tiles.sum_bytes(100) == 4 * 2 * 3 * 16 * 64
    assert FewRowsTiles.of(OUTPUTS, INPUTS + 16).tiles == ()


@pytest.mark.parametrize("rows", [0, 5, 20, 50, 70])
def test_a_product_is_the_same_by_either_kernel(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, plain = load(), load(few_rows=False)
    assert isinstance(linear, FewRowsLinear)
    assert isinstance(plain, Linear)
    assert torch.equal(linear.weight, plain.weight)
    assert (linear.shape, linear.dtype) == (plain.shape, plain.dtype)
    tiles, multiply = list[DenseTile](), run.multiply

    def counted(*given: Any) -> Tensor:
        tiles.append(given[-1])
        return multiply(*given)

    monkeypatch.setattr(run, "multiply", counted)
    x, out = torch.randn(rows, INPUTS), torch.full((rows, OUTPUTS + 2), 7.0)
    due = F.linear(x, plain.weight)
    torch.testing.assert_close(linear(x), due, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear.into(x, out[:, :OUTPUTS]), due, atol=1e-5, rtol=1e-5)
    assert (out[:, OUTPUTS:] == 7).all()
    tile = linear.tiles.choose(rows)
    assert tiles == ([] if tile is None else [tile, tile])
    beside = linear.activation_bytes(rows) - plain.activation_bytes(rows)
    assert beside == linear.tiles.sum_bytes(rows)


def test_others_stay_with_cublas() -> None:
    for linear in (load(few_rows=False), load(inputs=INPUTS + 16), load(bias=True)):
        assert isinstance(linear, Linear)


def test_every_number_of_rows_finds_its_product_built(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Recorder()
    monkeypatch.setattr(run, "product_kernel", kernel)
    few_rows_jit_module([FewRowsTiles.of(OUTPUTS, INPUTS)], BF16, CPU).build()
    before, meta = set(kernel.compiled), torch.device("meta")
    assert len(before) == 2
    linear = load_projection(MetaWeights(BF16, meta, few_rows_kernel=True), SIZES, INPUTS)
    for rows in range(70):
        linear(torch.empty(rows, INPUTS, dtype=BF16, device=meta))
    assert kernel.compiled == before


@pytest.mark.parametrize(
    ("backend", "major", "dtype", "due"),
    [
        ("auto", 9, BF16, True),
        ("torch", 9, BF16, False),
        ("auto", 10, BF16, False),
        ("auto", 9, torch.float16, False),
    ],
)
def test_measured_tiles_are_for_their_gpu_and_dtype(
    backend: str, major: int, dtype: torch.dtype, due: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    config = EngineConfig(str(TINY_MOE), dense_backend=backend)
    model = read_model_config(str(TINY_MOE))
    assert choose_dense(config, model, None, dtype, GPU).few_rows_kernel == due
    assert not choose_dense(config, model, None, dtype, CPU).few_rows_kernel


def test_a_plan_counts_and_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for kind, found in (("moe", "torch"), ("", "torch_ref")):
        name = f"dp_runtime.startup.rank_plan.choose_{kind}{'_' * bool(kind)}backend"
        monkeypatch.setattr(name, lambda *given, found=found: (found, "for the test"))
    model = read_model_config(str(TINY_MOE))
    size = model.num_heads * model.head_dim
    row = MeasuredProduct(model.hidden_size, size, NARROW, ((16, 9.0, 6.0),))
    monkeypatch.setattr(measured, "MEASURED", (row,))
    plans = {}
    for backend in ("auto", "torch"):
        config = EngineConfig(
            str(TINY_MOE), device="cuda", dense_backend=backend, num_pages=20, max_model_len=64,
            max_num_tokens=64, max_num_requests=8,
        )  # fmt: skip
        plans[backend] = plan_rank(config, 0, "cuda:0")
    chosen, plain = plans["auto"].dense, plans["torch"].dense
    assert chosen.few_rows_tiles == (FewRowsTiles.of(model.hidden_size, size),)
    assert f"{model.hidden_size} x {size} by a kernel" in chosen.reason
    assert chosen.is_notable
    assert plain.few_rows_tiles == ()
    assert not plain.is_notable
    assert plans["auto"].memory.weights > plans["torch"].memory.weights  # by counters
