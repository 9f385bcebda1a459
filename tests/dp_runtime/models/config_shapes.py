"""config.json of models that people have: published, mirrored, resaved, quantised, altered.

Written from knowledge of their fields. A shape is a published base with what is said beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Fields = dict[str, Any]

QWEN3_30B_A3B: Fields = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_235B_A22B = QWEN3_30B_A3B | {
    "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 94,
    "moe_intermediate_size": 1536, "num_attention_heads": 64, "num_hidden_layers": 94,
}  # fmt: skip
INSTRUCT_2507: Fields = {"max_position_embeddings": 262144, "rope_theta": 10000000}
CODER: Fields = {
    "qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0,
    "max_position_embeddings": 262144, "max_window_layers": 28, "rope_theta": 10000000,
    "router_aux_loss_coef": 0.0, "transformers_version": "4.52.3",
}  # fmt: skip
CODER_30B = QWEN3_30B_A3B | CODER | {"intermediate_size": 5472}
CODER_480B = QWEN3_30B_A3B | CODER | {
    "hidden_size": 6144, "intermediate_size": 8192, "max_window_layers": 62,
    "moe_intermediate_size": 2560, "num_attention_heads": 96, "num_experts": 160,
    "num_hidden_layers": 62, "num_key_value_heads": 8,
}  # fmt: skip
MIXTRAL_8X7B: Fields = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
MIXTRAL_8X22B = MIXTRAL_8X7B | {
    "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536,
    "num_attention_heads": 48, "num_hidden_layers": 56, "router_aux_loss_coef": 0.001,
    "transformers_version": "4.38.0",
}  # fmt: skip

FP8: Fields = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
}  # fmt: skip
YARN: Fields = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
OLD_YARN: Fields = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3: Fields = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

# to_dict() of transformers 4.51: everything that a configuration of that time had by default.
DUMP_4_51: Fields = {
    "_attn_implementation_autoset": True, "_name_or_path": "model", "add_cross_attention": False,
    "bad_words_ids": None, "begin_suppress_tokens": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0,
    "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "finetuning_task": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False,
    "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0,
    "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1,
    "num_beams": 1, "num_return_sequences": 1, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "pad_token_id": None, "prefix": None,
    "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False,
    "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False,
    "sep_token_id": None, "suppress_tokens": None, "task_specific_params": None,
    "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torchscript": False, "typical_p": 1.0,
    "use_bfloat16": False,
}  # fmt: skip
# The same of transformers 5.24, without the fields that the base has.
DUMP_5: Fields = {
    "transformers_version": "5.24.0", "output_hidden_states": False, "return_dict": True,
    "dtype": "bfloat16", "chunk_size_feed_forward": 0, "is_encoder_decoder": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "problem_type": None, "pad_token_id": None, "_name_or_path": "", "output_attentions": False,
}  # fmt: skip
UNSLOTH: Fields = {
    "pad_token_id": 151654, "unsloth_fixed": True, "unsloth_version": "2025.5.1",
    "model_name": "unsloth/Qwen3-30B-A3B",
}  # fmt: skip
TRAINED: Fields = {
    "use_cache": False, "router_z_loss_coef": 0.001, "attn_implementation": "flash_attention_2",
    "_flash_attn_2_enabled": True, "_commit_hash": "0123abcd", "model_max_length": 4096,
    "auto_map": {}, "gradient_checkpointing": True, "use_liger_kernel": True,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A config.json; `refused`: what its error says, where it does not load.

    Fields in `without` are not in it at all. unknown: the fields that the warning names.
    """

    name: str
    base: Fields
    changes: Fields = field(default_factory=dict)
    without: tuple[str, ...] = ()
    refused: str = ""
    unknown: tuple[str, ...] = ()

    @property
    def fields(self) -> Fields:
        merged = self.base | self.changes
        return {name: value for name, value in merged.items() if name not in self.without}


Q, B, C, D, M, X = (
    QWEN3_30B_A3B, QWEN3_235B_A22B, CODER_30B, CODER_480B, MIXTRAL_8X7B, MIXTRAL_8X22B,
)  # fmt: skip
NO_ROPE = ("rope_theta", "rope_scaling")
THETA = {"rope_theta": 1e6, "rope_type": "default"}

LOADS = [
    Shape("30B-A3B", Q),
    Shape("30B-A3B base", Q, {"eos_token_id": 151643, "max_position_embeddings": 32768}),
    Shape("30B-A3B instruct 2507", Q, INSTRUCT_2507),
    Shape("30B-A3B thinking 2507", Q, INSTRUCT_2507 | {"transformers_version": "4.53.0"}),
    Shape("235B-A22B", B),
    Shape("235B-A22B instruct 2507", B, INSTRUCT_2507 | {"rope_theta": 5000000}),
    Shape("coder 30B", C),
    Shape("coder 480B", D),
    Shape("30B-A3B FP8", Q, {"quantization_config": FP8}),
    Shape("30B-A3B 2507 FP8", Q, INSTRUCT_2507 | {"quantization_config": FP8}),
    Shape("235B-A22B FP8", B, {"quantization_config": FP8}),
    Shape("coder 30B FP8", C, {"quantization_config": FP8}),
    Shape("coder 480B FP8", D, {"quantization_config": FP8}),
    Shape(
        "FP8 as transformers 5 saves it", Q,
        {"quantization_config": FP8 | {
            "dequantize": False, "scale_fmt": "float", "expert_dtype": "fp8",
            "modules_to_convert": None,
        }},
    ),
    Shape(
        "FP8 with ignored_layers", Q,
        {"quantization_config": {k: v for k, v in FP8.items() if k != "modules_to_not_convert"}
         | {"ignored_layers": ["lm_head"]}},
    ),
    Shape("yarn by the model card", Q, {"rope_scaling": YARN, "max_position_embeddings": 131072}),
    Shape("yarn with the older type", Q, {"rope_scaling": OLD_YARN}),
    Shape("yarn with both types", Q, {"rope_scaling": YARN | {"type": "yarn"}}),
    Shape("yarn, every field", Q, {"rope_scaling": YARN | {
        "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.1, "mscale": 1.0,
        "mscale_all_dim": 0.5, "truncate": False, "finetuned": True, "extrapolation_factor": 1.0,
    }}),
    Shape("yarn, mscale", Q, {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
    Shape("yarn, zero betas are defaults", Q, {"rope_scaling": YARN | {
        "beta_fast": None, "beta_slow": None, "truncate": None,
    }}),
    Shape("yarn, original from max_position_embeddings", Q,
          {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
    Shape("rope_parameters", Q, {"rope_parameters": THETA}, NO_ROPE),
    Shape("rope_parameters with theta only", Q, {"rope_parameters": {"rope_theta": 5e5}}, NO_ROPE),
    Shape("rope_parameters with yarn", Q, {"rope_parameters": YARN | {"rope_theta": 1e6}}, NO_ROPE),
    Shape("rope_parameters with yarn, theta beside", Q, {"rope_parameters": YARN}),
    Shape("rope_parameters before rope_theta", Q, {"rope_parameters": {"rope_theta": 5e5}}),
    Shape("empty rope_parameters, old yarn", Q, {"rope_parameters": {}, "rope_scaling": YARN}),
    Shape("null rope_parameters, old yarn", Q, {"rope_parameters": None, "rope_scaling": YARN}),
    Shape("theta-only rope_parameters, old yarn", Q,
          {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": OLD_YARN}),
    Shape("default rope_parameters, old yarn", Q,
          {"rope_parameters": THETA, "rope_scaling": YARN}),
    Shape("equal in both layouts", Q,
          {"rope_parameters": YARN | {"rope_theta": 1e6}, "rope_scaling": OLD_YARN}),
    Shape("empty rope_scaling, new yarn", Q, {"rope_parameters": YARN, "rope_scaling": {}}),
    Shape("no rope field at all", Q, {}, NO_ROPE),
    Shape("linear", Q, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    Shape("linear in rope_parameters", Q,
          {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}}, NO_ROPE),
    Shape("llama3", Q, {"rope_scaling": LLAMA3}),
    Shape("type default", Q, {"rope_scaling": {"type": "default"}}),
    Shape("original_max_position_embeddings beside it", Q,
          {"rope_scaling": YARN, "original_max_position_embeddings": 32768}),
    Shape("dump of 4.51", Q, DUMP_4_51),
    Shape("dump of 4.51, 235B", B, DUMP_4_51),
    Shape("dump of 5", Q, DUMP_5 | {"rope_parameters": THETA, "num_local_experts": 128},
          (*NO_ROPE, "num_experts", "torch_dtype")),
    Shape("num_experts twice", Q, {"num_local_experts": 128}),
    Shape("num_local_experts only", Q, {"num_local_experts": 128}, ("num_experts",)),
    Shape("dtype and torch_dtype", Q, {"dtype": "float16"}),
    Shape("unsloth", Q, UNSLOTH),
    Shape("unsloth coder", C, UNSLOTH),
    Shape("trained", Q, TRAINED),
    Shape("trained and dumped", Q, DUMP_4_51 | TRAINED),
    Shape("pruned experts", Q, {"num_experts": 96, "norm_topk_prob": False}),
    Shape("no head_dim", Q, {}, ("head_dim",)),
    Shape("no num_key_value_heads", Q, {}, ("num_key_value_heads",)),
    Shape("dense layers", Q, {"mlp_only_layers": [0]}),
    Shape("sparse step", Q, {"decoder_sparse_step": 2}),
    Shape("null mlp_only_layers", Q, {"mlp_only_layers": None}),
    Shape("window without effect", Q, {"sliding_window": 4096, "max_window_layers": 28}),
    Shape("layer_types", Q, {"layer_types": ["full_attention"] * 48}),
    Shape("attention_bias", Q, {"attention_bias": True}),
    Shape("tied", Q, {"tie_word_embeddings": True}),
    Shape("mtp layers", Q, {"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 1}),
    Shape("unknown fields", Q, {"my_team": "x", "run_id": 7}, unknown=("my_team", "run_id")),
    Shape("8x7B", M),
    Shape("8x7B instruct", M, {"transformers_version": "4.36.0"}),
    Shape("8x7B as first published", M, {"sliding_window": 4096}),
    Shape("8x7B, window in use", M, {"sliding_window": 4096, "use_sliding_window": True}),
    Shape("8x7B, no window in use", M, {"use_sliding_window": True, "max_window_layers": 28}),
    Shape("8x7B fine-tune", M, {"eos_token_id": 32000, "vocab_size": 32002, "use_cache": False}),
    Shape("8x7B, head_dim null", M, DUMP_5 | {"head_dim": None, "router_jitter_noise": 0.0}),
    Shape("8x7B of 5", M, DUMP_5 | {"rope_parameters": THETA}, ("rope_theta", "torch_dtype")),
    Shape("8x7B, no kv heads", M, {}, ("num_key_value_heads",)),
    Shape("8x7B, no rope_theta", M, {}, ("rope_theta",)),
    Shape("8x7B, num_experts beside", M, {"num_experts": 8}),
    Shape("8x7B dump of 4.51", M, DUMP_4_51),
    Shape("8x7B yarn", M, {"rope_scaling": YARN, "head_dim": 128}),
    Shape("8x7B FP8", M, {"quantization_config": FP8}),
    Shape("8x22B", X),
    Shape("8x22B instruct", X, {"max_position_embeddings": 65536, "vocab_size": 32768}),
    Shape("8x22B fine-tune", X, TRAINED | {"_name_or_path": "x"}),
]  # fmt: skip

REFUSED = [
    Shape("two numbers of experts", Q, {"num_local_experts": 64},
          refused="num_local_experts: 64 is not allowed; num_experts is 128"),
    Shape("theta lost beside yarn", Q,
          {"rope_parameters": {"rope_theta": 5e6}, "rope_scaling": YARN},
          refused="rope_scaling: rope_type: 'yarn' is not allowed; rope_parameters, which"),
    Shape("yarn hidden by a default", Q,
          {"rope_parameters": YARN, "rope_scaling": {"rope_type": "default"}},
          refused="rope_scaling: rope_type: 'default' is not allowed; rope_parameters, which"),
    Shape("two yarns", Q,
          {"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 2.0}},
          refused="rope_scaling: rope_type: 'yarn' is not allowed; rope_parameters, which"),
    Shape("two types", Q, {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
          refused="rope_scaling: type: 'linear' is not allowed; rope_type is yarn"),
    Shape("original length lost", Q,
          {"rope_scaling": {"rope_type": "yarn", "factor": 4.0},
           "original_max_position_embeddings": 8192},
          refused="original_max_position_embeddings: 8192 is not allowed"),
    Shape("dynamic", Q, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, refused="'dynamic'"),
    Shape("longrope", M, {"rope_scaling": {"type": "longrope"}}, refused="'longrope'"),
    Shape("mrope", Q, {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}},
          refused="mrope_section"),
    Shape("1M context", Q, {"dual_chunk_attention_config": {"chunk_size": 262144}},
          refused="dual_chunk_attention_config"),
    Shape("coder with qkv_bias", C, {"qkv_bias": True}, refused="qkv_bias: True is not allowed"),
    Shape("coder without qk norm", C, {"use_qk_norm": False}, refused="use_qk_norm: False"),
    Shape("coder with a shared expert", C, {"shared_expert_intermediate_size": 512},
          refused="shared_expert_intermediate_size: 512"),
    Shape("mixtral with qk norm", M, {"use_qk_norm": True}, refused="use_qk_norm: True"),
    Shape("mixtral with bias", M, {"attention_bias": True}, refused="attention_bias: True"),
    Shape("another spelling of heads", Q, {"num_kv_heads": 8},
          refused="num_kv_heads: 8 is not allowed; num_key_value_heads is 4"),
    Shape("AWQ", Q, {"quantization_config": {"quant_method": "awq", "bits": 4}}, refused="'awq'"),
    Shape("GPTQ", M, {"quantization_config": {"quant_method": "gptq", "bits": 4}},
          refused="'gptq'"),
    Shape("bitsandbytes", Q, {"quantization_config": {"load_in_4bit": True}},
          refused="quant_method: None"),
    Shape("ModelOpt", Q, {"quantization_config": {"quant_method": "modelopt"}},
          refused="'modelopt'"),
    Shape("FP8 with static scales", Q,
          {"quantization_config": FP8 | {"activation_scheme": "static"}}, refused="'static'"),
    Shape("FP8 with two lists", Q, {"quantization_config": FP8 | {"ignored_layers": ["x"]}},
          refused="ignored_layers"),
    Shape("MLX", Q, {"quantization": {"group_size": 64, "bits": 4}}, refused="quantization: "),
    Shape("softcapping", Q, {"attn_logit_softcapping": 50.0}, refused="attn_logit_softcapping"),
    Shape("groups of experts", Q, {"n_group": 8, "topk_group": 4}, refused="n_group: 8"),
    Shape("sigmoid routing", Q, {"scoring_func": "sigmoid"}, refused="scoring_func: 'sigmoid'"),
    Shape("scaled routing", Q, {"routed_scaling_factor": 2.5}, refused="routed_scaling_factor"),
    Shape("hybrid", Q, {"full_attention_interval": 4}, refused="full_attention_interval: 4"),
    Shape("pruned heads", Q, {"pruned_heads": {"0": [1]}}, refused="pruned_heads"),
    Shape("encoder and decoder", Q, {"is_encoder_decoder": True}, refused="is_encoder_decoder"),
    Shape("nested", Q, {"text_config": {"hidden_size": 1}}, refused="text_config"),
]  # fmt: skip
