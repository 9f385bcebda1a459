"""What is compiled at start is what serving launches: no kernel runs here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.core.recurrent_metadata import AcceptedDrafts
from dp_runtime.core.request import RoutingShape
from dp_runtime.kernels import experts as triton_experts
from dp_runtime.kernels import moe_router as triton_router
from dp_runtime.kernels.slot_copy import slot_table
from dp_runtime.layers.experts import Experts, aligned
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.moe import RankSharding
from dp_runtime.layers.moe_kernels import TritonMoe
from dp_runtime.layers.moe_router import Router
from dp_runtime.layers.routing_buffer import RoutingBuffer
from dp_runtime.models.registry import read_model_config
from dp_runtime.parallel.padding import PaddingMode, PaddingPlan
from dp_runtime.runner.graphs.recurrent_inputs import RecurrentInputs
from dp_runtime.runner.state_copies import StateCopies
from dp_runtime.scheduler.scheduler_output import StateCopy, StateMoves
from dp_runtime.startup.jit_modules import delta_net_jit_module, moe_jit_modules
from dp_runtime.weights.fp8_blocks import ExpertScales
from tests.dp_runtime.layers.test_gated_delta_net import SMALL, drafts_of, net, sequences

TINY_MOE = Path(__file__).parents[3] / "examples" / "tiny_moe" / "checkpoint"
CPU, HALF = torch.device("cpu"), torch.float16
MAX_ROWS = 6000


@dataclass
class Recorder:
    """Stands in for a kernel: what Triton would compile one for, from each launch."""

    compiled: set[str] = field(default_factory=set)

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, *args: object, **constants: object) -> None:
        kinds = [
            f"{a.dtype} {a.dim()}" if isinstance(a, Tensor) else type(a).__name__ for a in args
        ]
        blocks = [getattr(arg, "block_shape", None) for arg in args]
        self.compiled.add(repr((kinds, blocks, sorted(constants.items()))))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    names = {triton_router: ["_product_kernel", "_route_kernel"]}
    names[triton_experts] = ["gate_up_kernel", "down_kernel", "sum_kernel"]
    found = []
    for module, jit_modules_of in names.items():
        for name in jit_modules_of:
            found.append(Recorder())
            monkeypatch.setattr(module, name, found[-1])
    return found


@pytest.mark.parametrize(
    ("sharding", "dp_rank", "dp_size", "fp8", "keeps"),
    [
        ("ep", 0, 1, False, False),
        ("ep", 3, 6, False, True),
        ("tp", 2, 6, False, False),
        ("ep", 0, 20, False, False),
        ("ep", 3, 6, True, False),
    ],
)
def test_every_number_of_rows_finds_its_kernels_built(
    sharding: str, dp_rank: int, dp_size: int, fp8: bool, keeps: bool, kernels: list[Recorder]
) -> None:
    model = read_model_config(str(TINY_MOE))
    if fp8:
        every_layer = (True,) * model.num_layers
        model = replace(model, hidden_size=256, moe_intermediate_size=128, fp8_experts=every_layer)
    shard = RankSharding(sharding, dp_rank, dp_size).shard(
        model.num_experts, model.moe_intermediate_size
    )
    shape = RoutingShape(3, model.num_experts_per_tok, model.num_experts) if keeps else None
    built = moe_jit_modules(model, shard, dp_size, MAX_ROWS, HALF, CPU, shape)
    assert len(built) == 1
    built[0].build()
    before = [set(kernel.compiled) for kernel in kernels]
    size, inner = len(shard.experts), aligned(len(shard.intermediate))
    assert [bool(kinds) for kinds in before] == [True, True, size > 0, size > 0, True]
    router = Router(
        Linear(torch.zeros(model.num_experts, model.hidden_size, dtype=HALF), None),
        model.num_experts_per_tok, model.norm_topk_prob,
        RoutingBuffer(shape, MAX_ROWS, 0, CPU).layer(1) if shape else None,
    )  # fmt: skip
    stored = torch.float8_e4m3fn if fp8 else HALF
    scale = torch.empty(1)
    experts = Experts(
        torch.empty(size, 2 * inner, model.hidden_size, dtype=stored),
        torch.empty(size, model.hidden_size, inner, dtype=stored),
        shard.experts.start,
        ExpertScales(scale, scale) if fp8 else None,
    )
    moe, gathered = TritonMoe(), torch.empty(MAX_ROWS, model.hidden_size, dtype=HALF)
    for rows in (*range(1, 700, 3), *range(700, MAX_ROWS, 97), MAX_ROWS):
        plan = PaddingPlan.for_mode(PaddingMode.RAGGED, (rows, *(0,) * (dp_size - 1)))
        moe.partial_sums(gathered[:rows], plan, None, router, experts)
    assert [kernel.compiled for kernel in kernels] == before


DELTA_KERNELS = {
    "gated_delta.convolution": ["_convolve_kernel"], "gated_delta.recurrent": ["_step_kernel"],
    "gated_delta.chunked": ["_solve_kernel", "_state_kernel"],
    "gated_delta.gated_norm": ["_gated_rms_norm_kernel"], "slot_copy": ["_copy_kernel"],
}  # fmt: skip


@pytest.mark.parametrize("max_drafts", [0, 3])
def test_no_pass_of_gated_delta_nets_wants_another_kernel(
    max_drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for module, names in DELTA_KERNELS.items():
        for name in names:
            found.append(Recorder())
            monkeypatch.setattr(f"dp_runtime.kernels.{module}.{name}", found[-1])
    delta_net_jit_module(SMALL, max_drafts, HALF, CPU).build()
    before = [set(kernel.compiled) for kernel in found]
    assert [len(kinds) for kinds in before] == [4, 1, 1, 2, 1, 1]
    layer = replace(net(SMALL, 9, HALF, max_drafts), in_kernels=True)
    for lengths in ([700, 1, 65, 4], [3] * 8, [9], [1]):
        none = [0] * len(lengths)
        drafts = drafts_of(none, none) if max_drafts else None
        of = sequences(lengths, list(range(1, len(lengths) + 1)), True, drafts)
        layer(torch.zeros(sum(lengths), SMALL.hidden_size, dtype=HALF), of)
    accepted = AcceptedDrafts(9, CPU) if max_drafts else None
    sizes = RecurrentInputs.shapes(8).items()
    words = {name: torch.zeros(size, dtype=torch.int32) for name, size in sizes}
    for length in {1, 1 + max_drafts}:
        ends = torch.arange(0, 9 * length, length, dtype=torch.int32)
        of = RecurrentInputs(words, accepted).sequences(ends, length)
        layer(torch.zeros(8 * length, SMALL.hidden_size, dtype=HALF), of)
    copies = StateCopies([layer.state], accepted, CPU)
    copies._table = slot_table(list(layer.state))  # as on a GPU
    copies.before(StateMoves(donated=(StateCopy(1, 2, 0), StateCopy(3, 4, 0))))
    assert [kernel.compiled for kernel in found] == before
