"""Matrices of e4m3 checkpoints that stay so: loaded, arranged, counted, and multiplied."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime import EngineConfig
from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.cache_spec import LayerCaches
from dp_runtime.core.e4m3 import E4M3
from dp_runtime.kernels.fp8_linear import run
from dp_runtime.kernels.fp8_linear.tiles import widened_from
from dp_runtime.layers.linear import Fp8Linear, Linear, Projection, load_projection
from dp_runtime.layers.moe import RankSharding
from dp_runtime.models.model import Model
from dp_runtime.models.registry import build_model, read_model_config
from dp_runtime.startup.execution_choices import DenseChoice, choose_dense
from dp_runtime.startup.jit_modules import dense_jit_module
from dp_runtime.startup.memory_estimate import Fp8Shape, fp8_shapes, param_bytes, widened_matrices
from dp_runtime.startup.rank_plan import plan_rank
from dp_runtime.weights.dummy import DummyWeights, MetaWeights
from dp_runtime.weights.fp8_blocks import BLOCK
from dp_runtime.weights.fp8_names import Fp8Names
from dp_runtime.weights.loader import Checkpoint
from dp_runtime.weights.source import WeightSource
from examples.benchmarks.harness.floors import DecodeBytes
from tests.dp_runtime.models.test_hybrid_weights import quantized
from tests.dp_runtime.paged import CPU, backend_over
from tests.dp_runtime.startup.test_jit_modules import Recorder
from tests.hybrid_checkpoints import NEXT, TEXT

HALF, BF16 = torch.float16, torch.bfloat16


def build(path: Path, source: WeightSource, dtype: torch.dtype) -> Model:
    config = read_model_config(str(path))
    specs = config.cache_specs(4, dtype, dtype)
    caches = LayerCaches.allocate(specs, PageGeometry(0, 4), 0, CPU)
    backend, sharding = backend_over(config, dtype=dtype), RankSharding("ep", 0, 1)
    return build_model(config, source, sharding, backend, "torch", states=caches.states)


def regrouped(weight: Tensor) -> Tensor:
    """Undo `interleave`."""
    return weight.view(len(weight), -1, 4, 2, 2).transpose(2, 3).reshape(weight.shape)


def widened(linear: Projection) -> Tensor:
    if not isinstance(linear, Fp8Linear):
        return linear.weight
    by_input = linear.scales.repeat_interleave(BLOCK, 0)[: linear.shape[1]].t()
    own = (regrouped(linear.weight.float()) * by_input).to(linear.dtype)
    return own if linear.rest is None else torch.cat([own, linear.rest.weight])


@pytest.fixture(scope="module", params=[TEXT])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An e4m3 checkpoint, of Qwen3.5 unless a test asks for others."""
    return quantized(tmp_path_factory.mktemp("fp8"), request.param, "model")[0]


def projections(model: Any) -> list[Projection]:
    found: list[Projection] = []
    for layer in model.layers:
        mixer, shared = layer.mixer, layer.mlp.shared.mlp
        first = mixer.inputs if hasattr(mixer, "inputs") else mixer.qkv_gate
        found += [first, mixer.output, shared.gate_up, shared.down]
    return found


@pytest.mark.parametrize("path", [TEXT, NEXT], indirect=True)
def test_kept_matrices_are_the_widened_ones_whatever_the_order_of_their_outputs(
    path: Path,
) -> None:
    names = Fp8Names.of_files([str(path)])
    heard: list[int] = []
    source = Checkpoint(str(path), CPU, HALF, heard.append, names)
    kept, wide = build(path, source, HALF), build(path, Checkpoint(str(path), CPU, HALF), HALF)
    counted = MetaWeights(HALF, torch.device("cuda"), names)
    planned = build(path, counted, HALF)
    assert sum(heard) == counted.bytes_read
    assert param_bytes(kept) == param_bytes(planned)
    pairs = list(zip(projections(kept), projections(wide), strict=True))
    assert all(isinstance(one, Fp8Linear) for one, _ in pairs)
    assert fp8_shapes(kept) == fp8_shapes(planned)
    for one, other in pairs:
        assert isinstance(other, Linear)
        assert one.shape == other.shape
        assert torch.equal(widened(one), other.weight)
        x = torch.randn(3, one.shape[1]).to(HALF)
        found, due = one(x), x.double() @ other.weight.double().t()
        assert (found.double() - due).norm() / due.norm() < 3e-3


def test_many_rows_meet_a_widened_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"model.a": 130, "model.b": 20}
    source = DummyWeights(0, CPU, torch.float32, fp8=Fp8Names(exempt=("b",)))
    linear = load_projection(source, sizes, 272)
    assert isinstance(linear, Fp8Linear)
    assert linear.weight.dtype == E4M3
    assert linear.rest is not None
    many = widened_from(130, 272)
    x = torch.randn(many, 272)
    due = x @ widened(linear).t()
    monkeypatch.setattr(run, "product_kernel", None)
    torch.testing.assert_close(linear(x), due, atol=1e-4, rtol=1e-4)
    assert linear(x[:0]).shape == (0, 150)
    assert linear.activation_bytes(many) > linear.activation_bytes(16)


def test_a_source_that_keeps_nothing_or_a_bias_widens() -> None:
    sizes, all_of_them = {"model.a": 64, "model.b": 32}, Fp8Names(exempt=())
    for source, bias in (
        (DummyWeights(0, CPU, BF16), False),
        (DummyWeights(0, CPU, BF16, fp8=all_of_them), True),
        (DummyWeights(0, CPU, BF16, fp8=Fp8Names(exempt=("model.a",))), False),
    ):
        assert isinstance(load_projection(source, sizes, 128, bias), Linear)
    first_only = DummyWeights(0, CPU, BF16, fp8=Fp8Names(exempt=("model.b",)))
    backwards = torch.arange(95, -1, -1)
    assert isinstance(load_projection(first_only, sizes, 128), Fp8Linear)
    assert isinstance(load_projection(first_only, sizes, 128, order=backwards), Linear)
    source = DummyWeights(0, CPU, BF16, fp8=all_of_them)
    linear = load_projection(source, sizes, 128, order=backwards)
    assert isinstance(linear, Fp8Linear)
    plain = load_projection(source, sizes, 128)
    assert torch.equal(widened(linear), widened(plain).flip(0))


def test_names_follow_the_list_of_a_config_or_the_scales_of_files(
    path: Path, tmp_path: Path
) -> None:
    listed = Fp8Names(exempt=("model.layers.0.self_attn", "in_proj_a", "mtp.fc"))
    assert "model.layers.1.self_attn.q_proj.weight" in listed
    assert "model.language_model.layers.1.self_attn.q_proj.weight" in listed
    assert "mtp.layers.0.self_attn.q_proj.weight" in listed
    for name in (
        "model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.linear_attn.in_proj_a.weight",
        "midlayer.self_attn.q_proj.weight",
    ):
        assert name not in listed
    assert "model.layers.1.self_attn.q_proj.weight" not in Fp8Names()
    stored = Fp8Names.of_files([str(path), str(tmp_path / "nothing")]).stored
    assert any(name.endswith("out_proj.weight") for name in stored)
    assert not any(".experts." in name for name in stored)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_on_cpu_and_by_default_all_is_widened(backend: str, path: Path) -> None:
    settings: dict[str, Any] = {"device": "cpu", "launcher": "thread", "num_pages": 20}
    config = EngineConfig(str(path), dense_backend=backend, max_model_len=64, **settings)
    plan = plan_rank(config, 0, "cpu")
    assert plan.dense.backend == "torch"
    assert "widened" in plan.dense.reason
    assert plan.dense.fp8_shapes == ()
    with pytest.raises(ValueError, match="dense_backend: 'triton' is not allowed; auto or torch"):
        plan_rank(EngineConfig(str(path), dense_backend="triton", **settings), 0, "cpu")


@pytest.mark.parametrize(
    ("major", "dtype", "has_e4m3", "why"),
    [
        (9, BF16, False, "auto or torch: no matrix is e4m3"),
        (10, BF16, True, r"auto or torch: its tiles .* 9 \(this device has 10\)"),
        (9, torch.float32, True, "auto or torch with dtype torch.float32"),
    ],
)
def test_a_gpu_that_could_not_use_it_says_why(
    path: Path, major: int, dtype: torch.dtype, has_e4m3: bool, why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    config, model = EngineConfig(str(path), dense_backend="triton"), read_model_config(str(path))
    model = model if has_e4m3 else replace(model, fp8_exempt=None)
    with pytest.raises(ValueError, match=f"dense_backend: 'triton' is not allowed; {why}"):
        choose_dense(config, model, None, dtype, torch.device("cuda"))


def test_kernels_without_a_matrix_are_refused(path: Path) -> None:
    wide = build(path, MetaWeights(BF16, torch.device("cuda")), BF16)
    assert DenseChoice("torch", "for the test").built(wide).fp8_shapes == ()
    with pytest.raises(
        ValueError, match="'triton' is not allowed; auto or torch: no matrix beside"
    ):
        DenseChoice("triton", "for the test").built(wide)


def test_a_plan_counts_what_a_gpu_would_keep(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        "dp_runtime.startup.rank_plan.choose_moe_backend", lambda *given: ("torch", "for the test")
    )
    monkeypatch.setattr(
        "dp_runtime.startup.rank_plan.choose_backend", lambda *given: ("torch_ref", "for the test")
    )
    held = {}
    for name in ("torch", "triton", "auto"):
        for load_format in ("safetensors", "dummy"):
            config = EngineConfig(
                str(path), device="cuda", dense_backend=name, num_pages=20, max_model_len=64,
                load_format=load_format, max_num_tokens=64, max_num_requests=8,
            )  # fmt: skip
            plan = plan_rank(config, 0, "cuda:0")
            held[name, load_format] = plan.memory.weights
            assert (plan.dense.fp8_shapes != ()) == (name == "triton")
            assert ("on an H200 it took" in plan.dense.reason) == (name == "auto")
            widened = {each.name.rpartition(".")[2] for each in plan.dense.widened}
            assert widened <= {"gate", "shared_expert_gate"}, "routers; all others can stay"
    assert held["triton", "dummy"] == held["triton", "safetensors"]
    assert held["torch", "dummy"] == held["torch", "safetensors"] == held["auto", "dummy"]
    source = Checkpoint(str(path), CPU, BF16, fp8=Fp8Names.of_files([str(path)]))
    assert held["triton", "dummy"] == param_bytes(build(path, source, BF16))


def test_a_matrix_that_is_widened_is_named_with_the_reason() -> None:
    keeps = partial(DummyWeights, 0, CPU, BF16)
    all_of_them, second = Fp8Names(exempt=()), Fp8Names(exempt=("model.a",))
    sizes, around = {"model.a": 64, "model.b": 32, "model.c": 16}, Fp8Names(exempt=("model.b",))
    backwards = torch.arange(111, -1, -1)
    for linear, names, why in (
        (load_projection(keeps(fp8=all_of_them), sizes, 128), "", ""),
        (load_projection(keeps(), sizes, 128), "", ""),
        (load_projection(keeps(fp8=all_of_them), sizes, 128, True), "abc", "it has a bias"),
        (load_projection(keeps(fp8=all_of_them), sizes, 24), "abc", "it has 24 inputs, no multi"),
        (load_projection(keeps(fp8=second), sizes, 128), "bc", "it is stacked behind one that is"),
        (load_projection(keeps(fp8=around), sizes, 128), "c", "it is stacked behind one that is"),
        (load_projection(keeps(fp8=around), sizes, 128, order=backwards), "ac", "in turns with"),
        (Linear.load(keeps(fp8=second), sizes, 128), "bc", "it is read in the model's dtype alone"),
    ):
        found = widened_matrices(linear)
        assert [each.name for each in found] == [f"model.{name}" for name in names]
        assert all(why in each.why for each in found)
        inputs = linear.shape[1]
        assert [each.num_bytes for each in found] == [2 * inputs * sizes[e.name] for e in found]


def test_the_floor_of_a_step_counts_what_is_read(path: Path) -> None:
    names, config = Fp8Names.of_files([str(path)]), read_model_config(str(path))
    for keeps_fp8 in (False, True):
        source = MetaWeights(BF16, torch.device("cuda"), names if keeps_fp8 else ())
        due = 0.0
        for linear in projections(build(path, source, BF16)):
            if not isinstance(linear, Fp8Linear):
                due += linear.weight.nbytes
                continue
            due += linear.weight.nbytes * (1 + 4 / BLOCK)
            due += 0 if linear.rest is None else linear.rest.weight.nbytes
        floor = DecodeBytes.for_step(config, 1, 8, 100.0, keeps_fp8=keeps_fp8)
        assert floor.dense_weights == due


@pytest.mark.parametrize(
    "sizes", [(512, 256, 512), (300, 272, 340), (383, 256, 384), (20480, 4096, 20608)]
)
def test_every_number_of_rows_finds_its_products_built(
    sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    product, copy = Recorder(), Recorder()
    monkeypatch.setattr(run, "product_kernel", product)
    monkeypatch.setattr(run, "widen_kernel", copy)
    outputs, inputs, all_outputs = sizes
    dense_jit_module([Fp8Shape(*sizes)], 2000, HALF, CPU).build()
    before = set(product.compiled), set(copy.compiled)
    assert all(before)
    meta = torch.device("meta")
    linear = load_projection(
        MetaWeights(HALF, meta, Fp8Names(exempt=("rest",))),
        {"model.a": outputs, "model.rest": all_outputs - outputs}, inputs,
    )  # fmt: skip
    many = widened_from(outputs, inputs)
    for rows in (1, 2, 16, 17, 40, 65, many // 2, many - 1, many, 2000):
        linear(torch.empty(rows, inputs, dtype=HALF, device=meta))
    assert (product.compiled, copy.compiled) == before
