"""Every tensor of a checkpoint is read, known to be skippable, or an error with its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dp_runtime.attention.torch_ref import TorchRefBackend
from dp_runtime.layers.moe import RankSharding
from dp_runtime.models.registry import build_model, read_model_config
from dp_runtime.speculative.draft import build_draft, read_draft_config
from dp_runtime.weights.loader import Checkpoint
from tests.checkpoints import add_mtp, eagle3_checkpoint, oracle, tiny_checkpoint
from tests.dp_runtime.models.ranks import Rank, close
from tests.dp_runtime.paged import CPU, spec_of
from tests.dp_runtime.thread_ranks import run_ranks

LAYER, ALONE = "model.layers.0.", RankSharding("ep", 0, 1)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("single"), num_experts=5)


@pytest.fixture
def copy(single: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(single, tmp_path / "copy"))


def add(path: Path, **tensors: Tensor) -> None:
    file = path / "model.safetensors"
    save_file(load_file(file) | tensors, file)


def change(path: Path, **fields: object) -> None:
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


def load(path: Path, sharding: RankSharding = ALONE) -> None:
    config = read_model_config(str(path))
    pool = torch.zeros(2, 2, config.num_kv_heads, 4, config.head_dim)
    backends = TorchRefBackend(spec_of(pool, config.num_heads), [pool] * 8)
    source = Checkpoint(str(path), CPU, torch.float32)
    model = build_model(config, source, sharding, backends)
    if (
        config.architecture.startswith("Qwen")
        and "num_nextn_predict_layers" in (path / "config.json").read_text()
    ):
        draft = read_draft_config(str(path), config, None)
        build_draft(draft, model, Checkpoint(str(path), CPU, torch.float32), sharding, backends)


def refuse(path: Path, *words: str) -> None:
    with pytest.raises(ValueError, match=r"tensor|not allowed") as caught:
        load(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "shape", "word"),
    [
        (f"{LAYER}self_attn.q_proj.bias", (64,), "attention_bias"),
        (f"{LAYER}self_attn.o_proj.bias", (64,), "attention_bias"),
        (f"{LAYER}mlp.gate.bias", (5,), "mlp"),
        (f"{LAYER}mlp.gate.e_score_correction_bias", (5,), "mlp"),
        (f"{LAYER}mlp.shared_expert.up_proj.weight", (8, 64), "shared_expert_intermediate_size"),
        (f"{LAYER}mlp.shared_expert_gate.weight", (1, 64), "shared_expert_intermediate_size"),
        (f"{LAYER}mlp.experts.5.up_proj.weight", (48, 64), "num_experts"),
        (f"{LAYER}mlp.up_proj.weight", (48, 64), "mlp_only_layers"),
        (f"{LAYER}self_attn.q_proj.lora_A.weight", (4, 64), LAYER),
        (f"{LAYER}self_attn.sinks", (4,), LAYER),
        ("model.layers.2.input_layernorm.weight", (64,), "num_hidden_layers"),
        ("model.norm.bias", (64,), "model.norm.bias"),
        ("lm_head.bias", (199,), "lm_head.bias"),
        ("something.new", (3,), "something.new"),
    ],
)
def test_a_tensor_that_the_model_does_not_have(
    copy: Path, name: str, shape: tuple[int, ...], word: str
) -> None:
    add(copy, **{name: torch.ones(shape)})
    refuse(copy, name, word, "model.safetensors")


def test_how_many_more_there_are(copy: Path) -> None:
    add(copy, **{f"{LAYER}self_attn.{n}_proj.bias": torch.ones(8) for n in "qkv"})
    refuse(copy, f"{LAYER}self_attn.k_proj.bias", "; 2 more like it")


def test_scales_beside_weights_that_are_not_quantised(copy: Path) -> None:
    name = f"{LAYER}self_attn.q_proj.weight_scale_inv"
    add(copy, **{name: torch.ones(1, 1)})
    refuse(copy, name, "is not e4m3")


@pytest.mark.parametrize("sharding", ["ep", "tp"])
@pytest.mark.parametrize("dp_size", [1, 3, 9])
def test_experts_of_other_ranks_are_known(copy: Path, sharding: str, dp_size: int) -> None:
    for rank in range(dp_size):
        load(copy, RankSharding(sharding, rank, dp_size))


def test_what_nothing_depends_on_is_skipped(copy: Path) -> None:
    add(
        copy,
        **{
            "model.rotary_emb.inv_freq": torch.ones(8),
            f"{LAYER}self_attn.rotary_emb.inv_freq": torch.ones(8),
            f"{LAYER}self_attn.k_scale": torch.ones(1),
            f"{LAYER}self_attn.v_proj.v_scale": torch.ones(1),
            "mtp.fc.weight": torch.zeros(64, 128), "mtp.layers.0.mlp.gate.weight": torch.ones(1),
            "v_head.summary.weight": torch.ones(1),
        },
    )  # fmt: skip
    load(copy)


def test_a_draft_layer_is_read_whole(copy: Path) -> None:
    add_mtp(copy)
    load(copy)
    add(copy, **{"mtp.layers.1.input_layernorm.weight": torch.ones(64)})
    load(copy)
    add(copy, **{"mtp.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    refuse(copy, "mtp.layers.0.self_attn.q_proj.bias", "attention_bias")


def test_an_eagle3_head_is_read_whole(single: Path, tmp_path: Path) -> None:
    head = eagle3_checkpoint(tmp_path, single)
    config = read_model_config(str(single))
    pool = torch.zeros(2, 2, config.num_kv_heads, 4, config.head_dim)
    backends = TorchRefBackend(spec_of(pool, config.num_heads), [pool] * 8)
    sharding = ALONE
    target = build_model(config, Checkpoint(str(single), CPU, torch.float32), sharding, backends)

    def draft() -> None:
        read = read_draft_config(str(single), config, str(head))
        build_draft(read, target, Checkpoint(str(head), CPU, torch.float32), sharding, backends)

    draft()
    add(head, **{"midlayer.self_attn.q_proj.bias": torch.ones(48)})
    with pytest.raises(ValueError, match=r"midlayer\.self_attn\.q_proj\.bias"):
        draft()


def test_a_head_of_its_own_beside_a_tied_embedding(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    change(copy, tie_word_embeddings=True)
    refuse(copy, "tie_word_embeddings: True", "lm_head.weight")
    add(copy, **{"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    load(copy)
    change(copy, tie_word_embeddings=False)
    tokens = list(range(20))
    with torch.inference_mode():
        expected = oracle(copy)(torch.tensor([tokens])).logits[0]
    change(copy, tie_word_embeddings=True)
    close(run_ranks(1, lambda one: Rank(copy, one).step([tokens])[0])[0], expected)


def test_a_head_that_is_missing(copy: Path) -> None:
    file = copy / "model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if k != "lm_head.weight"}, file)
    refuse(copy, "lm_head.weight is missing")
    change(copy, tie_word_embeddings=True)
    load(copy)


def test_the_config_wants_biases_that_are_not_there(copy: Path) -> None:
    change(copy, attention_bias=True)
    refuse(copy, "self_attn.q_proj.bias is missing")


def test_a_tensor_of_a_shard_that_the_index_does_not_name(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, max_shard_size="200KB")
    load(path)
    shard = max(path.glob("*.safetensors"))
    name = f"{LAYER}self_attn.q_proj.bias"
    save_file(load_file(shard) | {name: torch.ones(64)}, shard)
    refuse(path, name, "attention_bias", shard.name)


@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_a_tensor_of_two_shards_must_be_one(tmp_path: Path, delta: float) -> None:
    path = tiny_checkpoint(tmp_path, max_shard_size="200KB")
    name = f"{LAYER}self_attn.q_proj.weight"
    shard_of = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    own, other = shard_of[name], next(s for s in shard_of.values() if s != shard_of[name])
    value = load_file(path / own)[name] + delta
    save_file(load_file(path / other) | {name: value}, path / other)
    if delta:
        refuse(path, name, own, other)
    else:
        load(path)
