"""ModelConfig: the architecture-independent facts of a model, parsed and checked at start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dp_runtime.errors import require
from dp_runtime.layers.attention import AttentionShape
from dp_runtime.layers.rotary import RopeConfig
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.registry import ARCHITECTURES, architecture_module
from dp_runtime.weights.fp8_blocks import BLOCK

__all__ = ["ModelConfig", "RopeConfig", "read_model_config"]


@dataclass(frozen=True)
class ModelConfig:
    """What the layers need to know of a model; sizes are those of the whole model.

    moe_layers says for each layer whether it is an MoE stage; the others have a dense MLP of
    `intermediate_size`. fp8_experts says for each layer whether its experts, if it has any, are
    e4m3 in the checkpoint, with a scale for each block of 128 x 128. eos_token_ids are those of
    generation_config.json where it names any.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    intermediate_size: int
    moe_layers: tuple[bool, ...]  # [layer]
    fp8_experts: tuple[bool, ...]  # [layer]
    norm_topk_prob: bool
    tie_word_embeddings: bool
    attention_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        where = "config.json: "
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"{where}num_key_value_heads", self.num_kv_heads,
            f"a divisor of num_attention_heads {self.num_heads}",
        )  # fmt: skip
        require(self.head_dim % 2 == 0, f"{where}head_dim", self.head_dim, "an even number")
        require(
            self.num_experts_per_tok <= self.num_experts,
            f"{where}num_experts_per_tok", self.num_experts_per_tok,
            f"at most the number of experts, {self.num_experts}",
        )  # fmt: skip
        # Grouped matrix products want rows whose length is a multiple of 16 bytes in any dtype.
        require(
            self.hidden_size % 8 == 0, f"{where}hidden_size", self.hidden_size, "a multiple of 8"
        )
        assert len(self.moe_layers) == self.num_layers, "moe_layers has one entry per layer"
        assert len(self.fp8_experts) == self.num_layers, "fp8_experts has one entry per layer"
        if any(self.fp8_experts):
            for name in ("hidden_size", "moe_intermediate_size"):
                size = getattr(self, name)
                allowed = f"a multiple of {BLOCK}, as e4m3 experts have a scale for each {BLOCK}"
                require(size % BLOCK == 0, f"{where}{name}", size, allowed)

    @property
    def num_moe_layers(self) -> int:
        return sum(self.moe_layers)

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(
            self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim,
            self.attention_bias, self.rms_norm_eps if self.qk_norm else None,
        )  # fmt: skip


def read_model_config(directory: str) -> ModelConfig:
    """Parse `config.json` and `generation_config.json` of a Hugging Face directory.

    Raises ValueError, in one line, for whatever is missing, malformed or not supported.
    """
    root = Path(directory)
    require(root.is_dir(), "model", directory, "an existing directory")
    path = root / "config.json"
    require(path.is_file(), "model", directory, "a directory with a config.json")
    fields = ConfigFields.read(path)
    name = check_architecture(fields)
    eos = fields.integers("eos_token_id")
    generation = root / "generation_config.json"
    if generation.is_file():
        eos = ConfigFields.read(generation).integers("eos_token_id") or eos
    config: ModelConfig = architecture_module(name).parse_config(fields, eos)
    fields.finish()
    return config


def check_architecture(fields: ConfigFields) -> str:
    """The supported architecture that config.json names; ValueError listing those there are."""
    supported = ", ".join(ARCHITECTURES)
    names = fields.get("architectures")
    ok = isinstance(names, list) and len(names) == 1 and names[0] in ARCHITECTURES
    fields.require(ok, "architectures", names, f"one of {supported}")
    name = str(names[0])
    model_type = ARCHITECTURES[name].model_type
    fields.require(
        fields.get("model_type") == model_type, "model_type", fields.get("model_type"),
        f"{name} has model_type {model_type!r}",
    )  # fmt: skip
    return name


def parse_head_dim(fields: ConfigFields, hidden_size: int, num_heads: int) -> int:
    """`head_dim`, or hidden_size / num_attention_heads where it is absent."""
    if fields.get("head_dim") is None:
        fields.require(
            hidden_size % num_heads == 0, "num_attention_heads", num_heads,
            f"without head_dim, a divisor of hidden_size {hidden_size}",
        )  # fmt: skip
    return fields.integer("head_dim", hidden_size // num_heads)
