"""Which tensors of e4m3 checkpoints are e4m3, asked of the files: parts of a delta net, drafts.

Numbers in names are those of the groups of mistakes that other runtimes made with such models.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dp_runtime import EngineConfig
from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.cache_spec import LayerCaches
from dp_runtime.core.e4m3 import E4M3
from dp_runtime.layers.moe import RankSharding
from dp_runtime.models.registry import build_model, read_model_config
from dp_runtime.speculative.draft import build_draft, read_draft_config
from dp_runtime.speculative.mtp import Mtp, MtpConfig
from dp_runtime.startup.build_rank import load_rank
from dp_runtime.startup.rank_plan import plan_rank
from dp_runtime.weights.fp8_blocks import dequantize, quantize
from dp_runtime.weights.loader import Checkpoint
from tests.dp_runtime.models.ranks import Rank
from tests.dp_runtime.models.test_hybrid_weights import TOKENS, edit_config, quantized
from tests.dp_runtime.paged import CPU, backend_over
from tests.dp_runtime.thread_ranks import ThreadCollective, run_ranks
from tests.hybrid_checkpoints import NEXT, TEXT, VISION, add_mtp, hybrid_checkpoint, read, rewrite

DRAFT_EXPERTS = re.compile(r"mtp\.layers\.0\.mlp\.experts\.\d+\.\w+\.weight")


def narrow(path: Path, names: list[str]) -> dict[str, Tensor]:
    """Turn matrices of a checkpoint into e4m3, and return what they stand for."""
    tensors, widened = read(path), dict[str, Tensor]()
    for name in names:
        values, scales = quantize(tensors[name])
        tensors |= {name: values, f"{name}_scale_inv": scales}
        widened[name] = dequantize(values, scales)
    rewrite(path, tensors)
    return widened


@pytest.mark.parametrize("architecture", [TEXT, NEXT])
def test_e4m3_b_and_a_of_fewer_rows_than_a_block_are_whole_on_every_rank_28(
    architecture: str, tmp_path: Path
) -> None:
    """A rank runs all heads of its own requests: no block is divided, and b and a are widened."""
    fp8, wide = quantized(tmp_path, architecture, "model")
    names = [name for name in read(wide) if re.search(r"in_proj_(a|b|ba)\.weight$", name)]
    assert names
    rewrite(wide, read(wide) | narrow(fp8, names))

    def run(path: Path, collective: ThreadCollective) -> Tensor:
        rank = Rank(path, collective, dtype=torch.bfloat16)
        (net,) = rank.model.delta_nets
        assert net.inputs.weight.shape[0] == net.shape.projected_size
        assert net.inputs.weight.dtype == torch.bfloat16
        return rank.step([TOKENS], (len(TOKENS),) * 2)[0]

    found, due = (run_ranks(2, partial(run, path)) for path in (fp8, wide))
    assert all(torch.equal(one, other) for one, other in zip(found, due, strict=True))


@pytest.mark.parametrize("is_listed", [True, False])
@pytest.mark.parametrize("is_narrow", [True, False])
def test_whether_a_draft_layer_is_e4m3_is_asked_of_the_files_18(
    is_narrow: bool, is_listed: bool, tmp_path: Path
) -> None:
    path, wide = quantized(tmp_path, TEXT, "model")
    drafts = {name: t for name, t in read(add_mtp(wide)).items() if name.startswith("mtp.")}
    rewrite(path, read(path) | drafts)
    edit_config(path, mtp_num_hidden_layers=1)
    quantization = json.loads((path / "config.json").read_text())["quantization_config"]
    exempt = [*quantization["modules_to_not_convert"], *(["mtp"] if is_listed else [])]
    edit_config(path, quantization_config=quantization | {"modules_to_not_convert": exempt})
    experts = [name for name in read(path) if DRAFT_EXPERTS.fullmatch(name)]
    widened = narrow(path, experts) if is_narrow else {name: read(path)[name] for name in experts}
    config = read_model_config(str(path))
    draft = read_draft_config(str(path), config, None)
    assert isinstance(draft, MtpConfig)
    assert draft.layer.fp8_experts == (is_narrow,)
    specs = config.cache_specs(4, torch.bfloat16, torch.bfloat16)
    for backend in ("torch", "triton"):
        source, sharding = Checkpoint(str(path), CPU, torch.bfloat16), RankSharding("ep", 0, 1)
        caches = LayerCaches.allocate(specs, PageGeometry(0, 4), 0, CPU)
        target = build_model(
            config, source, sharding, backend_over(config), "torch", states=caches.states
        )
        built = build_draft(draft, target, source, sharding, backend_over(draft), backend)
        assert isinstance(built, Mtp)
        (stage,) = built.moe_stages
        stays = is_narrow and backend == "triton"
        assert stage.experts.down.dtype == (E4M3 if stays else torch.bfloat16)
        if not stays:
            due = widened["mtp.layers.0.mlp.experts.1.down_proj.weight"].bfloat16()
            assert torch.equal(stage.experts.down[1], due)


LEFT_OUT, ANOTHER = "mtp.layers.0.mlp.shared_expert.up_proj", "mtp.layers.0.mlp.shared_experts.up"


@pytest.mark.parametrize("architecture", [TEXT, VISION, NEXT])
def test_no_weight_of_a_draft_layer_is_dropped_18(architecture: str, tmp_path: Path) -> None:
    path = add_mtp(hybrid_checkpoint(tmp_path, architecture))
    tensors = read(path)
    config = EngineConfig(
        str(path), device="cpu", launcher="thread", num_pages=20, max_model_len=64,
        speculative_num_steps=2,
    )  # fmt: skip
    for changed, text in (
        ({name: t for name, t in tensors.items() if LEFT_OUT not in name}, "is missing"),
        (tensors | {f"{ANOTHER}.weight": torch.zeros(3)}, "has no such tensor"),
    ):
        rewrite(path, changed)
        with pytest.raises(ValueError, match=text) as caught:
            load_rank(config, plan_rank(config, 0, "cpu"), lambda count: None)
        assert "mtp.layers.0.mlp.shared_expert" in str(caught.value)
