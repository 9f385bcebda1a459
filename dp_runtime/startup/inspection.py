"""A description of what would run: shapes, bytes per rank and backends, without loading a model."""

from __future__ import annotations

from dataclasses import replace

from dp_runtime.config import EngineConfig
from dp_runtime.core.cache_spec import RecurrentState
from dp_runtime.core.membership import Membership
from dp_runtime.layers.moe_kernels import make_moe_kernels
from dp_runtime.metrics.memory import RankMemory, memory_table
from dp_runtime.startup.jit_modules import jit_modules_of
from dp_runtime.startup.rank_plan import RankPlan, sketch_rank


def describe(config: EngineConfig, device: str) -> str:
    """Describe every rank's plan as text, also one for which the memory is too small.

    Raises ValueError if it could not start for any other reason.
    """
    plans = [sketch_rank(config, rank, device) for rank in range(config.dp_size)]
    first = plans[0]
    lines = [*_model_lines(first), *_choice_lines(config, first), *_rank_lines(plans)]
    lines += _fewer_lines(config, first, device)
    if config.host_weights:
        lines.append(_copy_line([plan.load_bytes for plan in plans]))
    missing = dict.fromkeys(plan.shortage for plan in plans if plan.shortage)
    return "\n".join([*lines, *(f"does not fit: {shortage}" for shortage in missing)])


def _fewer_lines(config: EngineConfig, plan: RankPlan, device: str) -> list[str]:
    """Say for fewer ranks, each with the pages that it has, whether they can hold the experts."""
    kept = replace(config, num_pages=plan.pages.num_pages)
    fit, lacking = list[str](), list[str]()
    for size in range(config.dp_size - 1, 0, -1):
        fewer = sketch_rank(kept, size - 1, device, Membership.first(size))
        (lacking if fewer.shortage else fit).append(str(size))
    told = [f"{', '.join(fit)} can hold the experts" if fit else ""]
    told += [f"{', '.join(lacking)} can not" if lacking else ""]
    fewest = config.min_dp_size or config.dp_size
    text = "; ".join(filter(None, told))
    return [f"fewer      of the ranks {text}; min_dp_size is {fewest}"] if text else []


def _model_lines(plan: RankPlan) -> list[str]:
    model = plan.model
    return [
        f"model      {model.architecture}: {model.num_layers} layers ({model.num_moe_layers} MoE), "
        f"hidden {model.hidden_size}, vocabulary {model.vocab_size}",
        f"attention  {model.num_heads} query and {model.num_kv_heads} KV heads of {model.head_dim}",
        *_draft_lines(plan),
        f"experts    {model.num_experts} of intermediate size {model.moe_intermediate_size}, "
        f"top {model.num_experts_per_tok}{_fp8_note(plan)}",
        *_state_lines(plan),
        *_image_lines(plan),
    ]


def _image_lines(plan: RankPlan) -> list[str]:
    vision, images, limits = plan.model.vision, plan.images, plan.limits
    if vision is None or images is None:
        return []
    return [
        f"images     {vision.depth} layers of {vision.hidden_size}; up to {images.max_pixels:,} "
        f"pixels, {limits.max_image_tokens} tokens; features of {limits.num_image_slots} are kept"
    ]


def _state_lines(plan: RankPlan) -> list[str]:
    if not plan.slot_bytes:
        return []
    caches = plan.layers[0].caches
    num_layers = sum(isinstance(cache, RecurrentState) for cache in caches)
    return [
        f"state      {num_layers} of {len(caches)} layers are recurrent: {plan.slot_bytes:,} bytes "
        f"a request, {plan.limits.num_state_slots} slots with the null one{_checkpoint_note(plan)}"
    ]


def _checkpoint_note(plan: RankPlan) -> str:
    count = plan.limits.num_state_checkpoints
    kept = f"{count} of them, {count * plan.slot_bytes:,} bytes, for the prefix cache"
    return f"; {kept}" if count else ""


def _draft_lines(plan: RankPlan) -> list[str]:
    if plan.draft is None:
        return []
    draft = plan.draft
    return [
        f"draft      {draft.method} of {draft.directory}: {draft.num_layers} layer, vocabulary "
        f"{draft.vocab_size}, up to {plan.limits.max_drafts} tokens a step"
    ]


def _fp8_note(plan: RankPlan) -> str:
    if not any(plan.model.fp8_experts):
        return ""
    kept = make_moe_kernels(plan.moe_backend).reads_fp8
    return f", e4m3 in the checkpoint and {'in memory' if kept else f'widened to {plan.dtype}'}"


def _choice_lines(config: EngineConfig, plan: RankPlan) -> list[str]:
    limits = plan.limits
    return [
        f"ranks      {config.dp_size} on {plan.device}, {plan.dtype}, launcher {config.launcher}",
        f"backend    {plan.backend}: {plan.backend_reason}",
        f"kernels    {_kernel_names(plan)}",
        f"moe        {plan.moe_backend}: {plan.moe_reason}",
        *_dense_lines(plan),
        f"graphs     {'yes' if plan.graphs else 'no'}: {plan.graphs_reason}",
        f"prefixes   {'yes' if plan.prefix_cache.hasher else 'no'}: {plan.prefix_cache.reason}",
        f"sharding   experts by {config.moe_sharding}, padding {config.padding}, "
        f"routing {config.routing}",
        f"limits     {limits.max_num_requests} requests and {limits.max_num_tokens} tokens a step "
        f"and rank, sequences of {limits.max_model_len} tokens",
    ]


def _dense_lines(plan: RankPlan) -> list[str]:
    if not plan.dense.is_notable:
        return []
    return [f"dense      {plan.dense.backend}: {plan.dense.reason}"]


def _kernel_names(plan: RankPlan) -> str:
    return ", ".join(kernel.name for kernel in jit_modules_of(plan)) or "none to compile"


def _copy_line(sizes: list[int]) -> str:
    each = ", ".join(f"{size / 2**20:,.1f}" for size in sizes)
    total = sum(sizes) / 2**20
    return f"copies of the weights in host memory, in MiB: {each}; {total:,.1f} in all"


def _rank_lines(plans: list[RankPlan]) -> list[str]:
    lines = ["rank  experts    intermediate  KV pages  cache tokens"]
    for rank, plan in enumerate(plans):
        model = plan.model
        shard = plan.sharding.shard(model.num_experts, model.moe_intermediate_size)
        experts = f"{shard.experts.start}..{shard.experts.stop - 1}" if shard.experts else "none"
        lines.append(
            f"{rank:>4}  {experts:<9}  {len(shard.intermediate):>12}  "
            f"{plan.pages.num_pages:>8}  {plan.cache_tokens:>12,}"
        )
    return [*lines, memory_table([RankMemory(p.dp_rank, p.memory) for p in plans])]
