"""The fields of config.json that no model reads, as data.

A field in none of these tables is unknown: it is named in a warning and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IRRELEVANT: Mapping[str, tuple[str, ...]] = {
    "bookkeeping": (
        "architectures", "model_type", "_name_or_path", "name_or_path", "_commit_hash", "auto_map",
        "transformers_version", "tokenizer_class", "processor_class", "custom_pipelines",
        "unsloth_fixed", "unsloth_version", "model_name", "base_model_name_or_path", "prefix",
        "_from_auto", "_auto_class", "vocab_file", "license", "language", "tags", "description",
    ),
    "kernels and parallelism of other libraries": (
        "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
        "_attn_implementation_internal", "_flash_attn_2_enabled", "use_flash_attn",
        "use_flash_attention", "use_flash_attention_2", "experts_implementation",
        "_experts_implementation", "_experts_implementation_internal", "use_kernels",
        "use_liger_kernel", "pretraining_tp", "base_model_tp_plan", "base_model_ep_plan",
        "base_model_pp_plan", "base_model_fsdp_plan", "tp_plan", "ep_plan", "tp_size", "ep_size",
        "expert_model_parallel_size", "model_parallel_size", "seed", "device_map",
        "chunk_size_feed_forward", "torchscript",
        "tf_legacy_loss", "use_cache", "cache_implementation", "max_batch_size",
    ),
    "the dtype of the checkpoint, which its tensors say themselves": (
        "torch_dtype", "dtype", "use_bfloat16", "fp16", "bf16", "fp32", "params_dtype",
    ),
    "training": (
        "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop",
        "attention_probs_dropout_prob", "hidden_dropout_prob", "ffn_dropout", "dropout",
        "dropout_prob", "expert_dropout", "initializer_range", "initializer_factor", "init_std",
        "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise", "aux_loss_alpha",
        "moe_aux_loss_coeff", "z_loss_coef", "seq_aux", "output_router_logits",
        "gradient_checkpointing", "use_reentrant", "max_grad_norm", "freeze_router", "loss_type",
        "router_dtype", "moe_router_dtype", "ignore_index", "use_cut_cross_entropy",
    ),
    "outputs that the runtime does not have": (
        "output_attentions", "output_hidden_states", "output_scores", "output_logits",
        "return_dict", "return_dict_in_generate", "keys_to_ignore_at_inference",
    ),
    "task heads": (
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
        "task_specific_params", "classifier_dropout", "summary_type", "summary_use_proj",
    ),
    "token ids, and lengths that other libraries enforce": (
        "bos_token_id", "pad_token_id", "sep_token_id", "eos_token_id", "cls_token_id",
        "mask_token_id", "unk_token_id", "decoder_start_token_id", "forced_bos_token_id",
        "forced_eos_token_id", "image_token_id", "video_token_id", "model_max_length",
        "max_seq_len", "max_seq_length", "max_sequence_length", "seq_length", "padding_side",
    ),
    "defaults of generation, which requests set": (
        "max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample", "num_beams",
        "early_stopping", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
        "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
        "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
        "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "renormalize_logits", "guidance_scale", "sequence_bias",
        "token_healing", "stop_strings", "max_time", "penalty_alpha", "dola_layers", "low_memory",
        "watermarking_config", "generation_config", "prompt_lookup_num_tokens",
        "assistant_confidence_threshold", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "use_mtp", "is_assistant", "assistant_early_exit", "assistant_lookbehind",
        "target_lookbehind", "compile_config", "disable_compile", "cache_config",
        "continuous_batching_config", "max_matching_ngram_size", "constraints", "force_words_ids",
        "max_cache_len", "_from_model_config", "assistant_ensemble_weight", "speculation_type",
        "prefill_chunk_size",
    ),
    "nothing in a decoder-only model without sliding window": (
        "is_decoder", "tie_encoder_decoder", "legacy", "num_mtp_layers", "num_logits_to_keep",
         "max_window_layers", "num_nextn_predict_layers",
    ),
}  # fmt: skip
IRRELEVANT_PREFIXES = ("mtp_",)  # a draft layer of the checkpoint reads its own
IRRELEVANT_SUFFIXES = ("_token_id", "_token_index", "_dropout")

ALIASES: Mapping[str, str] = {
    # Another spelling of a field that the runtime reads; both must say the same.
    "num_local_experts": "num_experts", "n_routed_experts": "num_experts",
    "moe_num_experts": "num_experts", "num_moe_experts": "num_experts",
    "num_experts": "num_local_experts",
    "num_experts_per_token": "num_experts_per_tok", "moe_topk": "num_experts_per_tok",
    "moe_top_k": "num_experts_per_tok", "moe_k": "num_experts_per_tok",
    "top_k_experts": "num_experts_per_tok", "experts_per_token": "num_experts_per_tok",
    "num_layers": "num_hidden_layers", "n_layer": "num_hidden_layers",
    "n_layers": "num_hidden_layers", "n_embd": "hidden_size", "d_model": "hidden_size",
    "n_head": "num_attention_heads", "n_heads": "num_attention_heads",
    "num_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "num_kv_heads": "num_key_value_heads", "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim", "v_head_dim": "head_dim", "qk_head_dim": "head_dim",
    "n_positions": "max_position_embeddings", "layer_norm_eps": "rms_norm_eps",
    "norm_eps": "rms_norm_eps", "layernorm_epsilon": "rms_norm_eps",
    "layer_norm_epsilon": "rms_norm_eps", "hidden_activation": "hidden_act",
    "activation_function": "hidden_act", "rotary_emb_base": "rope_theta",
    "rotary_base": "rope_theta", "rotary_embedding_base": "rope_theta",
    "norm_epsilon": "rms_norm_eps", "expert_ffn_hidden_size": "moe_intermediate_size",
    "moe_ffn_hidden_size": "moe_intermediate_size", "ffn_hidden_size": "intermediate_size",
    "n_inner": "intermediate_size", "rope_base": "rope_theta",
    "padded_vocab_size": "vocab_size", "norm_topk_probs": "norm_topk_prob",
    "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip

OFF: tuple[Any, ...] = (False, 0, [], {})
FIXED_PREFIXES = (  # of layers, tensors and scales that the runtime does not have
    "mamba_", "ssm_", "linear_", "index_", "indexer_", "kda_", "swa_", "conv_", "altup_", "hc_",
    "ngram_", "vision_", "audio_", "cross_", "relative_attention", "laurel_", "loop_", "compress_",
)  # fmt: skip
FIXED: Mapping[str, tuple[Any, ...]] = {
    # Fields that change the mathematics, and the values that say what the runtime computes.
    "is_encoder_decoder": (False,), "add_cross_attention": (False,), "pruned_heads": ({}, []),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,), "per_layer_config": ({},), "text_config": (),
    "quantization_config": (),
    "compression_config": (), "sparsity_config": ({},),
    "adapter_config": (), "lora_rank": (0,),
    # Attention
    "qkv_bias": (False,), "use_qkv_bias": (False,), "attention_out_bias": (False,),
    "attention_qkv_bias": (False,), "o_proj_bias": (False,), "use_bias": (False,),
    "add_bias_linear": (False,), "use_qk_norm": (False,), "qk_norm": (False,),
    "qk_layernorm": (False,), "clip_qkv": (), "attn_logit_softcapping": (0, 0.0),
    "query_pre_attn_scalar": (), "attention_multiplier": (), "attn_scale": (),
    "attention_sink": (False,), "attention_sink_bias": (False,), "use_attention_sinks": (False,),
    "add_swa_attention_sink_bias": (False,), "add_full_attention_sink_bias": (False,),
    "attn_output_gate": (False,), "use_output_gate": (False,), "attention_chunk_size": (),
    "attn_temperature_tuning": (False, 0), "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,), "nope_layer_interval": (0,), "use_nope": (False,),
    "alibi": (False,), "use_alibi": (False,), "position_embedding_type": ("rope", "rotary"),
    "use_rope": (True,), "rope_interleave": (False,), "use_mrope": (False,),
    "mrope_section": (), "rope_local_base_freq": (), "rotary_pct": (1.0,), "rotary_dim": (),
    "rotary_percent": (1.0,), "qk_rope_head_dim": (), "qk_nope_head_dim": (), "kv_lora_rank": (),
    "q_lora_rank": (), "sliding_window_pattern": (), "sliding_window_size": (),
    "global_attn_every_n_layers": (), "full_attention_interval": (1,), "hybrid_layer_pattern": (),
    "num_kv_shared_layers": (0,), "layers_block_type": (), "block_types": (),
    "attn_layer_period": (1,), "attn_layer_offset": (0,), "attn_layer_indices": (),
    "attention_types": (), "attention_type": (), "layer_rope_theta": (), "qk_norm_type": (),
    "use_attention_gate": (False,), "attention_k_eq_v": (False,), "attention_value_scale": (1.0,),
    "qk_scale_factor": (1.0,), "key_multiplier": (1.0,), "attention_in_multiplier": (1.0,),
    "attention_out_multiplier": (1.0,), "query_bias": (False,), "key_bias": (False,),
    "value_bias": (False,), "qv_bias": (False,), "proj_bias": (False,), "multi_query": (False,),
    "o_lora_rank": (), "o_groups": (), "sliding_windows": (), "use_logn_attn": (False,),
    "use_dynamic_ntk": (False,), "rope_ratio": (1.0,), "rope_type": ("default",),
    "rope_scaling_factor": (1.0,), "rope_factor": (1.0,), "use_rotary_embedding": (True,),
    "is_hybrid": (False,),
    "dual_chunk_attention_config": (), "sparse_attention_config": (), "quantization": (),
    "use_sliding_window": (False,), "index_topk": (), "parallel_attn": (False,),
    "parallel_block": (False,), "use_parallel_residual": (False,),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
    "attention_window": (), "attention_window_size": (), "window_size": (), "attn_config": (),
    "ffn_config": (), "position_encoding": ("rope", "rotary"), "pos_embd_type": ("rope", "rotary"),
    "is_neox_style": (True,), "rotary_interleaved": (False,), "rope_interleaved": (False,),
    "rope_pct": (1.0,), "block_configs": (), "num_key_value_heads_per_layer": (),
    "attention_sinks": (False,), "num_sink_tokens": (0,), "num_meta_tokens": (0,),
    "q_bias": (False,), "k_bias": (False,), "v_bias": (False,), "qkv_proj_bias": (False,),
    "attn_bias": (False,), "gated_attention": (False,), "headwise_attn_output_gate": (False,),
    "elementwise_attn_output_gate": (False,),
    # Experts
    "shared_expert_intermediate_size": (0,), "moe_shared_expert_intermediate_size": (0,),
    "n_shared_experts": (0,), "num_shared_experts": (0,), "num_shared_expert": (0,),
    "shared_intermediate_size": (0,), "use_shared_expert": (False,),
    "routed_scaling_factor": (1.0,), "moe_routed_scaling_factor": (1.0,),
    "router_scaling_factor": (1.0,), "route_scale": (1.0,), "scoring_func": ("softmax",),
    "moe_router_score_function": ("softmax",), "score_func": ("softmax",),
    "topk_method": ("greedy",), "n_group": (0, 1), "topk_group": (0, 1),
    "num_expert_group": (0, 1), "num_expert_groups": (0, 1), "use_expert_bias": (False,),
    "moe_router_enable_expert_bias": (False,), "use_routing_bias": (False,),
    "router_bias": (False,), "first_k_dense_replace": (0,), "moe_layer_freq": (1,),
    "interleave_moe_layer_step": (1,), "moe_layers": (), "moe_layer_start_index": (0,),
    "moe_layer_interval": (1,), "num_dense_layers": (0,), "zero_expert_num": (0,),
    "moe_latent_size": (0,), "norm_topk_prob": (True,), "mlp_only_layers": ([],),
    "decoder_sparse_step": (1,), "expert_bias": (False,), "experts_bias": (False,),
    "mlp_layer_types": (), "expert_layer_period": (1,), "expert_layer_offset": (0,),
    "moe_num_shared_experts": (0,), "shared_experts_intermediate_size": (0,),
    "moe_router_scaling_factor": (1.0,), "moe_router_logit_softcapping": (0, 0.0),
    "moe_apply_router_weight_on_input": (False,), "expert_selection_fn": ("softmax",),
    "num_zero_experts": (0,), "is_moe": (True,), "enable_moe_block": (True,),
    "use_gated_mlp": (True,), "activation_sparsity_pattern": (), "swiglu_limits": (),
    "swiglu_limit": (), "swiglu_alpha": (), "expert_capacity": (),
    "apply_router_weight_on_input": (False,), "norm_after_topk": (False,),
    "use_grouped_topk": (False,), "gated_linear_unit": (True,),
    "router_activation": ("softmax",), "router_score_function": ("softmax",),
    "score_function": ("softmax",), "num_experts_per_layer": (), "n_shared_expert": (0,),
    # Scales, norms and the head
    "mlp_bias": (False,), "bias": (False,), "lm_head_bias": (False,),
    "final_logit_softcapping": (0, 0.0), "logit_scale": (1.0,),
    "logits_scaling": (1.0,), "lm_head_multiplier": (1.0,), "embedding_multiplier": (1.0,),
    "embedding_scale": (1.0,), "scale_emb": (1.0,), "scale_embedding": (False,),
    "scale_depth": (), "dim_model_base": (), "residual_multiplier": (1.0,),
    "mup_width_multiplier": (1.0,), "residual_scale": (1.0,),
    "output_multiplier": (1.0,), "mlp_multipliers": (), "type_vocab_size": (0,),
    "logits_mup_width_multiplier": (1.0,), "mup_enabled": (False,),
    "norm_bias": (False,), "norm_after": (False,), "use_sandwich_norm": (False,),
    "apply_residual_connection_post_layernorm": (False,), "use_mup": (False,),
    "norm_type": ("rmsnorm", "rms_norm", "RMSNorm"), "normalization": ("RMSNorm",),
    "use_layernorm": (False,), "rms_norm_add_unit_offset": (False,),
    "zero_centered_gamma": (False,), "layernorm_zero_centered": (False,),
    "use_post_norm": (False,), "post_norm": (False,), "sandwich_norm": (False,),
    "final_logit_softcap": (0, 0.0), "attn_logit_softcap": (0, 0.0), "logits_soft_cap": (0, 0.0),
    "untie_embeddings_and_output_weights": (True,), "lm_head_scale": (1.0,),
    "rmsnorm_unit_offset": (False,), "use_rms_norm": (True,), "use_swiglu": (True,),
    "layernorm_num": (), "norm_head": (False,), "emb_layer_norm_before": (False,),
    "hidden_size_per_layer_input": (0,), "vocab_size_per_layer_input": (0,),
    "altup_num_inputs": (), "residual_in_fp32": (False, True),
    "attention_bias": (False,), "sliding_window": (), "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0,), "layer_types": (),
}  # fmt: skip


def is_irrelevant(name: str) -> bool:
    kind = name.startswith(IRRELEVANT_PREFIXES) or name.endswith(IRRELEVANT_SUFFIXES)
    return kind or any(name in group for group in IRRELEVANT.values())


def fixed_values(name: str) -> tuple[Any, ...] | None:
    """Return the values that say what the runtime computes; None where any may."""
    if name not in FIXED and name.startswith(FIXED_PREFIXES):
        return OFF
    return FIXED.get(name)
