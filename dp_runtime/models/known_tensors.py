"""Tensors of a checkpoint that no model reads, as data: patterns of names."""

from __future__ import annotations

from collections.abc import Mapping

SKIPPABLE: Mapping[str, str] = {
    r"\brotary_emb\.inv_freq$": "a buffer that older libraries save; it follows from the config",
    r"^mtp\.": "a draft layer, which a draft model reads by itself",
    r"\bself_attn\.([kvq]_proj\.)?[kvq]_scale$": "of a quantised KV cache, read where it is one",
    r"\b(self_attn|attn)\.(kv|prob)_scale$": "of another library's quantised attention",
    r"^(v_head|value_head)\.": "of reinforcement learning",
}
SKIPPABLE_WITHOUT_IMAGES: Mapping[str, str] = {
    r"^(model\.)?(visual|vision_tower|audio_tower|multi_modal_projector)\.": "of other models",
}
SKIPPABLE_WHILE_DRAFTING: Mapping[str, str] = {
    r"^(?!mtp\.)": "of the target",
    r"^mtp\.layers\.[1-9]": "further draft layers: the first is used recursively",
}

HINTS: Mapping[str, str] = {  # fields that tensors which no model reads may contradict
    r"\bself_attn\.\w+\.bias$": "attention_bias, num_hidden_layers",
    r"\b[qk]_norm\.": "architectures (q/k norm is Qwen3's), num_hidden_layers",
    r"\bshared_expert": "architectures, shared_expert_intermediate_size, num_hidden_layers",
    r"\.experts\.": "num_experts, num_local_experts, mlp_only_layers, num_hidden_layers",
    r"\bmlp\.": "mlp_only_layers, decoder_sparse_step, num_hidden_layers",
    r"^model\.layers\.\d+\.": "num_hidden_layers",
}
