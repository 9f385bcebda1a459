"""The config.json of an EAGLE-3 head, checked against its target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dp_runtime.errors import require
from dp_runtime.layers.attention import AttentionShape
from dp_runtime.layers.rotary import RopeConfig
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.moe_decoder import parse_head_dim, warn_of_unknown
from dp_runtime.models.rope_config import RopeFamily, parse_rope
from dp_runtime.speculative.draft import DraftConfig
from dp_runtime.weights.loader import tensor_names

FIELD = "speculative_draft_model"
ARCHITECTURE = "LlamaForCausalLMEagle3"
LAYER_PREFIXES = ("midlayer", "layers.0")
EMBEDDING, MAP = "embed_tokens.weight", "d2t"
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(DraftConfig):
    target_vocab_size: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    layer_prefix: str  # of its tensors' names
    own_embedding: bool
    reduced: bool  # its vocabulary is mapped to the target's

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(
            self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim, False, None
        )


def read_config(directory: str, target: ModelConfig) -> Eagle3Config:
    """Parse a head's config.json; ValueError for what is not supported or does not fit."""
    root = Path(directory)
    require(root.is_dir(), FIELD, directory, "an existing directory")
    path = root / "config.json"
    require(path.is_file(), FIELD, directory, "a directory with a config.json")
    fields = ConfigFields.read(path, f"{FIELD}: config.json")
    names = fields.get("architectures")
    fields.require(names == [ARCHITECTURE], "architectures", names, f"only {[ARCHITECTURE]}")
    check_supported(fields)
    hidden, num_heads = target.hidden_size, fields.integer("num_attention_heads")
    check_equal(fields, "hidden_size", hidden)
    check_equal(fields, "target_hidden_size", hidden, default=hidden)
    check_equal(fields, "vocab_size", target.vocab_size)
    tensors = tensor_names(directory)
    vocab_size = fields.integer("draft_vocab_size", target.vocab_size)
    config = Eagle3Config(
        method="eagle3",
        directory=directory,
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=parse_head_dim(fields, hidden, num_heads),
        vocab_size=vocab_size,
        hidden_size=hidden,
        aux_hidden_state_layers=parse_aux_hidden_state_layers(fields, target.num_layers),
        target_vocab_size=target.vocab_size,
        intermediate_size=fields.integer("intermediate_size"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=parse_rope(
            fields, RopeFamily(10_000.0), fields.integer("max_position_embeddings", 2048)
        ),
        layer_prefix=next(
            (p for p in LAYER_PREFIXES if f"{p}.hidden_norm.weight" in tensors), LAYER_PREFIXES[0]
        ),
        own_embedding=EMBEDDING in tensors,
        reduced=vocab_size < target.vocab_size or MAP in tensors,
    )
    warn_of_unknown(fields.finish_known({}))
    check_sizes(fields, config)
    return config


def check_supported(fields: ConfigFields) -> None:
    for name, allowed in {
        "model_type": "llama", "num_hidden_layers": 1, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "bias": False, "tie_word_embeddings": False,
        "norm_before_residual": False, "norm_before_fc": False, "fc_norm": False,
        "use_sliding_window": False,
    }.items():  # fmt: skip
        fields.only(name, allowed)
    fields.skip(["target_model_type", "sliding_window", "max_window_layers"])


def check_equal(fields: ConfigFields, name: str, expected: int, default: int | None = None) -> None:
    value = fields.integer(name, default)
    fields.require(value == expected, name, value, f"the target has {expected}")


def check_sizes(fields: ConfigFields, config: Eagle3Config) -> None:
    fields.require(
        config.num_heads % config.num_kv_heads == 0, "num_key_value_heads", config.num_kv_heads,
        f"a divisor of num_attention_heads {config.num_heads}",
    )  # fmt: skip
    fields.require(config.head_dim % 2 == 0, "head_dim", config.head_dim, "an even number")
    fields.require(
        config.vocab_size <= config.target_vocab_size, "draft_vocab_size", config.vocab_size,
        f"at most vocab_size {config.target_vocab_size}",
    )  # fmt: skip


def parse_aux_hidden_state_layers(fields: ConfigFields, num_layers: int) -> tuple[int, ...]:
    """Read which of the target's layers the head reads the inputs of."""
    # Heads name layers by their inputs, or by the outputs of the layers before: these begin with 1.
    # SGLang tells them apart in the same way (its PR #25454).
    section = fields.section("eagle_config")
    layers: tuple[int, ...] = ()
    if section is not None:
        layers = section.integers(LAYER_IDS)
        for name, allowed in {
            "use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True,
            "use_last_layernorm": True, "use_mtp_layernorm": False, "next_layer_regular": True,
            "has_lm_head": True, "parallel_draft_step": 1,
        }.items():  # fmt: skip
            section.only(name, allowed)
        section.skip(["parallel_draft_heads_num_layers"])
        section.finish()
    if layers[:1] == (1,):
        layers = tuple(layer + 1 for layer in layers)
    default = (2, num_layers // 2, num_layers - 3)
    found = layers or default
    fields.require(
        min(found) >= 0 and max(found) < num_layers, f"eagle_config: {LAYER_IDS}", found,
        f"layers below the target's {num_layers} (by default {default})",
    )  # fmt: skip
    return found
