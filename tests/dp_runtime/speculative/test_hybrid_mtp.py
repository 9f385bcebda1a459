"""The MTP layer of the Qwen3.5 family and Qwen3-Next against transformers' MtpLayer.

Numbers in names are those of the groups of mistakes that other runtimes made with such models.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_runtime.models.registry import read_model_config
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.speculative.draft import read_draft_config
from dp_runtime.weights.fp8_blocks import dequantize, quantize
from tests.dp_runtime.drafts import DraftRank, on_ranks
from tests.hybrid_checkpoints import (
    NEXT,
    TEXT,
    VISION,
    add_mtp,
    fuse_experts,
    hybrid_checkpoint,
    oracle,
    read,
    rewrite,
)

ARCHITECTURES = [TEXT, VISION, NEXT]
ATTENDING: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
ROWS = 21
TOKENS = torch.randint(1, 180, (ROWS + 2,), generator=torch.Generator().manual_seed(0))
BLOCKS: dict[str, Any] = {  # of 128, as e4m3 weights have them
    "hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
    "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4,
}  # fmt: skip


def checkpoint(directory: Path, architecture: str, **overrides: Any) -> Path:
    return add_mtp(hybrid_checkpoint(directory, architecture, **ATTENDING, **overrides))


class Oracle:
    """transformers' target, and its MtpLayer with the checkpoint's tensors."""

    def __init__(self, path: Path) -> None:
        from transformers.modeling_layers import MtpLayer

        self.model = oracle(path)
        self.trunk = self.model.model
        self.trunk = getattr(self.trunk, "language_model", self.trunk)
        config = self.trunk.config
        config._attn_implementation = "eager"
        family = config.model_type.removesuffix("_text")
        module = import_module(f"transformers.models.{family}.modeling_{family}")
        prefix = {"qwen3_5_moe": "Qwen3_5Moe", "qwen3_next": "Qwen3Next"}[family]
        layer, norm = (getattr(module, f"{prefix}{name}") for name in ("DecoderLayer", "RMSNorm"))
        self.mtp = MtpLayer(config, layer, norm, 0).eval()
        self.load(path)

    def load(self, path: Path) -> None:
        names = {"pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "fc": "eh_proj",
                 "layers.0": "mtp_block", "norm": "post_norm"}  # fmt: skip
        state, experts = dict[str, Tensor](), dict[str, list[tuple[int, Tensor]]]()
        for name, tensor in read(path).items():
            if not name.startswith("mtp."):
                continue
            own = name.removeprefix("mtp.")
            start = next(one for one in names if own.startswith(f"{one}."))
            own = names[start] + own.removeprefix(start)
            if ".experts." in own and own.endswith("_proj.weight"):
                experts.setdefault(own.split(".")[-2], []).append((int(own.split(".")[-3]), tensor))
            else:
                state[own] = tensor
        if experts:
            gate, up, down = (
                torch.stack([tensor for _, tensor in sorted(experts[f"{part}_proj"], key=number)])
                for part in ("gate", "up", "down")
            )
            state["mtp_block.mlp.experts.gate_up_proj"] = torch.cat((gate, up), 1)
            state["mtp_block.mlp.experts.down_proj"] = down
        self.mtp.load_state_dict(state)

    @torch.inference_mode()
    def unroll(self, steps: int) -> list[Tensor]:
        """What each step of the MTP layer gives behind the target [rows, hidden].

        Step j of row p reads token p + 1 + j and the state of step j - 1.
        """
        ids = TOKENS[None]
        trunk = self.trunk(ids[:, :ROWS], use_cache=False).last_hidden_state
        positions = torch.arange(ROWS)[None]
        three = positions.expand(3, 1, -1)  # of an image's time, height and width: here the same
        rope = positions if self.trunk.config.model_type == "qwen3_next" else three
        cos_sin = self.trunk.rotary_emb(trunk, rope)
        mask = torch.full((1, 1, ROWS, ROWS), -torch.inf).triu(1)
        hidden, found = trunk, []
        for step in range(steps):
            embeds = self.trunk.embed_tokens(ids[:, 1 + step : 1 + step + ROWS])
            hidden = self.mtp(embeds, hidden, cos_sin, mask, positions, None)
            found.append(hidden[0])
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.model.lm_head(hidden)
        return result


def number(item: tuple[int, Tensor]) -> int:
    return item[0]


def close(found: Tensor, due: Tensor) -> None:
    torch.testing.assert_close(found, due, atol=1e-4, rtol=1e-3)


def on_one_rank(path: Path, use: Callable[[DraftRank], Any]) -> Any:
    return on_ranks(1, lambda one: use(DraftRank(path, None, one)))[0]


def draft_logits(path: Path) -> Tensor:
    """Of the rows behind a target's own hidden states."""

    def run(rank: DraftRank) -> Tensor:
        tokens = TOKENS.tolist()
        out = rank.follow([tokens[:ROWS]], [0], [tokens[1 : ROWS + 1]])
        return rank.draft.logits(out.last)

    found: Tensor = on_one_rank(path, run)
    return found


# sglang #35797, sglang #36158, vllm-mlx #400; LightLLM #1402: the state after the final norm.
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers_18_20(architecture: str, tmp_path: Path) -> None:
    """Rows in chunks of any length, and a draft that is chained to the first row.

    A later one attends to rows of the first step before it, transformers' unrolling to its own.
    """
    path = checkpoint(tmp_path, architecture)
    due = Oracle(path)
    steps = due.unroll(2)
    tokens = TOKENS.tolist()

    def run(rank: DraftRank) -> None:
        done = 0
        for count in (1, 2, 9, 1, ROWS - 13):
            end = done + count
            out = rank.follow([tokens[done:end]], [done], [tokens[done + 1 : end + 1]])
            close(out.last, steps[0][done:end])
            close(rank.draft.logits(out.last), due.logits(steps[0][done:end]))
            done = end

    on_one_rank(path, run)

    # A chain attends to the first step's rows before it, transformers' unrolling to its own: they
    # are equal in the first row.
    def chain(rank: DraftRank) -> None:
        first = rank.follow([tokens[:1]], [0], [tokens[1:2]])
        close(rank.run_draft([tokens[2:3]], [0], first.last).last, steps[1][:1])

    on_one_rank(path, chain)


@pytest.mark.parametrize("moe_sharding", ["ep", "tp"])
def test_ranks_with_different_rows(moe_sharding: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, TEXT)
    due, tokens = Oracle(path).unroll(1)[0], TOKENS.tolist()

    def run(collective: RowCollective) -> None:
        rank = DraftRank(path, None, collective, moe_sharding=moe_sharding)
        for start, end in ((0, 0), (0, 5), (5, 5 + collective.dp_rank)):
            if collective.dp_rank == 0:
                start = end = 0
            out = rank.follow([tokens[start:end]], [start], [tokens[start + 1 : end + 1]])
            close(out.last, due[start:end])

    on_ranks(3, run)


@pytest.mark.parametrize("architecture", [TEXT, VISION])
def test_stacked_experts_are_the_same_layer_18(architecture: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, architecture)
    due = draft_logits(path)
    fuse_experts(path)
    assert any(name == "mtp.layers.0.mlp.experts.gate_up_proj" for name in read(path))
    assert torch.equal(draft_logits(path), due)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_e4m3_weights_are_those_that_they_stand_for_18(architecture: str, tmp_path: Path) -> None:
    """As the releases have it: of the MTP layer all is e4m3 but fc, norms and gates."""
    path = checkpoint(tmp_path, architecture, **BLOCKS)
    wide, narrow = read(path), dict[str, Tensor]()
    for name, tensor in wide.items():
        if tensor.dim() != 2 or not name.endswith("_proj.weight") or ".visual." in name:
            narrow[name] = tensor
            continue
        values, scales = quantize(tensor)
        narrow |= {name: values, f"{name}_scale_inv": scales.bfloat16()}
        wide[name] = dequantize(values, scales.bfloat16())
    rewrite(path, wide)
    due = draft_logits(path)
    rewrite(path, narrow)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "mtp.fc", "mtp.layers.0.mlp.gate"],
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    target = read_model_config(str(path))
    layer: Any = read_draft_config(str(path), target, None)
    assert layer.layer.fp8_experts == (True,)
    assert torch.equal(draft_logits(path), due)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layer_attends_whatever_its_target_does(architecture: str, tmp_path: Path) -> None:
    path = add_mtp(hybrid_checkpoint(tmp_path, architecture))
    target = read_model_config(str(path))
    config: Any = read_draft_config(str(path), target, None)
    assert (config.layer.num_layers, config.layer.delta_net_layers) == (1, (False,))
    (cache,) = config.cache_specs(16, torch.bfloat16, torch.bfloat16)
    assert cache.page_bytes == 2 * 2 * 16 * 32 * 2


def test_an_embedding_of_its_own_and_unread_tensors_are_refused_18(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, VISION)
    tensors = read(path)
    rewrite(path, tensors | {"mtp.layers.0.mlp.surplus.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"mtp\.layers\.0\.mlp\.surplus\.weight"):
        draft_logits(path)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["mtp_use_dedicated_embeddings"] = True
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="mtp_use_dedicated_embeddings"):
        read_draft_config(str(path), read_model_config(str(path)), None)


def test_a_checkpoint_without_the_layer_is_told_so(tmp_path: Path) -> None:
    path = hybrid_checkpoint(tmp_path, VISION, **ATTENDING)
    with pytest.raises(ValueError, match="name the directory of an EAGLE-3 head"):
        read_draft_config(str(path), read_model_config(str(path)), None)
