"""EngineConfig: everything a user chooses, checked before any process starts."""

from __future__ import annotations

from dataclasses import KW_ONLY, MISSING, dataclass

from dp_runtime.core.faults import ALLOWED, ENDS_PROCESS, FIELD, Fault, read_faults
from dp_runtime.core.settings import check_settings, setting, settings_of
from dp_runtime.core.step_program import MAX_DRAFTS, SERVING_PROGRAMS, Program, speculative_programs
from dp_runtime.errors import require
from dp_runtime.parallel.padding import PaddingMode
from dp_runtime.parallel.policies.policy_name import PolicyName, policy
from dp_runtime.parallel.transports import TRANSPORTS, check_transport

MAX_TIMEOUT_S = 604_800  # a week; poll() and Gloo can not wait for more than 2**31 - 1 ms
ROUTINGS = ("round_robin", "least_tokens", "least_padded_cost", "prefix_aware")


@dataclass(frozen=True)
class EngineConfig:
    """Configuration of an engine; every value is checked on construction (ValueError).

    docs/settings.md is the list of these fields with their texts, and each is a flag of launch.py.
    """

    model: str = setting(
        MISSING, "a Hugging Face directory, as the ranks see it", allowed="the path of a directory"
    )
    _: KW_ONLY
    dp_size: int = setting(
        1, "number of ranks; need not divide the number of experts", at_least=1, at_most=4096
    )
    ranks_per_gpu: int = setting(
        1, "ranks that share a GPU; more than one, which then meet in host memory, is for "
        "experiments with few GPUs, not for speed", at_least=1,
    )  # fmt: skip
    device: str = setting(
        "auto", "where ranks run; auto: cpu if there is no GPU, cuda with room for all ranks, else "
        "an error", choices=("auto", "cpu", "cuda"),
    )  # fmt: skip
    dtype: str = setting(
        "auto", "type of weights and activations; auto: float32 on CPU, bfloat16 on GPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    launcher: str = setting(
        "ray", "what ranks are: Ray actors, processes of this host, or threads, for tests",
        choices=("ray", "local", "thread"),
    )  # fmt: skip
    ray_address: str | None = setting(
        None, "cluster to join: auto, host:port or ray://host:port",
        shown_default="$RAY_ADDRESS, else a new cluster on this host",
        allowed="auto, host:port or ray://host:port",
    )  # fmt: skip
    attention_backend: str = setting(
        "auto", "attention kernels; auto: torch_ref on CPU, trtllm on GPU, or split where measured "
        "to be faster: trtllm with decodes by a kernel of our own. flashinfer has its own kernels",
        choices=("auto", "split", "trtllm", "flashinfer", "torch_ref"),
    )  # fmt: skip
    kv_cache_dtype: str = setting(
        "auto", "type of KV pages; auto: that of the weights; fp8_e4m3: per-tensor scales from the "
        "checkpoint, else 1.0", choices=("auto", "fp8_e4m3"),
    )  # fmt: skip
    collective: str = setting(
        "auto", "how rows travel between ranks; auto: on one host shared_memory for CPU ranks and "
        "for ranks that share GPUs, peer_to_peer (kernels that write into the other GPUs' memory, "
        "made for NVLink) for a GPU each; on several hosts torch_distributed (Gloo, NCCL)",
        choices=("auto", *TRANSPORTS),
    )  # fmt: skip
    moe_sharding: str = setting(
        "ep", "experts split by expert (ep) or by intermediate size (tp)", choices=("ep", "tp")
    )
    moe_backend: str = setting(
        "auto", "kernels of the experts; auto: triton on GPU, torch (grouped_mm) on CPU",
        choices=("auto", "triton", "torch"),
    )  # fmt: skip
    dense_backend: str = setting(
        "auto", "beside experts: torch is cuBLAS, widens e4m3; triton keeps it, faster to 64 rows; "
        "auto widens it, few bf16 rows by the faster kernel", choices=("auto", "triton", "torch"),
    )  # fmt: skip
    padding: str = setting(
        PaddingMode.MAX_LEN.value,
        "rows a rank brings to a collective; max_len: the largest rank's, ragged: its own, auto: "
        "the cheaper of the two for each step, by a cost measured at start. Steps with graphs have "
        "the size of a bucket instead",
        **policy("padding", "gathered_rows", tuple(mode.value for mode in PaddingMode)),
    )
    routing: str = setting(
        "least_tokens", "how a request is given to a rank: in turn, to the one with the fewest "
        "unfinished tokens, to the one that pads a decode step least, or so that the largest "
        "prefill that waits, less what its rank has cached, and decode step stay small",
        **policy("routing", "choose", ROUTINGS),
    )  # fmt: skip
    max_moves: int = setting(
        2, "times that a request may go from its rank's queue to another rank that could start it "
        "sooner; 0: it waits where it is", at_least=0, at_most=16,
    )  # fmt: skip
    language_model_only: bool = setting(False, "load no vision encoder, and refuse images")
    max_image_pixels: int | None = setting(
        None, "pixels to which a larger image of a prompt is resized", at_least=1024,
        shown_default="the model's",
    )  # fmt: skip
    image_cache_tokens: int | None = setting(
        None, "tokens of images whose features a rank keeps, for prompts that have them again",
        at_least=2, shown_default="two of the largest image, and max_num_tokens",
    )  # fmt: skip
    page_size: int = setting(64, "tokens of a KV page", at_least=1)
    num_pages: int | None = setting(
        None, "KV pages of a rank, the null page included", at_least=2,
        shown_default="for max_num_requests of max_model_len, within kv_memory_fraction",
    )  # fmt: skip
    kv_memory_fraction: float | None = setting(
        None, "share that KV pages may take of the device's memory beside weights, recurrent "
        "states, workspaces, activations and a reserve; num_pages overrides it",
        above=0, at_most=1, shown_default="0.5 on CPU, 0.9 on GPU",
    )  # fmt: skip
    kv_events: bool = setting(False, "keep events of prefix caches, for engine.kv_events()")
    prefix_caching: bool = setting(
        True, "keep full KV pages for requests that begin alike, until their memory is needed"
    )
    prefix_state_strategy: str = setting(
        "extra_buffer", "recurrent states kept for them: copies, near prompts' ends and in texts; "
        "no_buffer: only what a request ends with, if at a page's end, as 1 in page_size does: "
        "a prompt sent again is rarely found", choices=("extra_buffer", "no_buffer"),
    )  # fmt: skip
    num_state_checkpoints: int | None = setting(
        None, "states that a rank keeps", at_least=1, shown_default="max(8, max_num_requests / 4)"
    )
    state_track_interval: int = setting(
        256, "tokens of an output from one copied state to the next, in full pages", at_least=1
    )
    max_num_requests: int = setting(64, "requests of a rank in a step", at_least=1)
    max_num_tokens: int = setting(
        2048, "tokens of a rank in a step; longer prompts run in chunks", at_least=1
    )
    max_step_ms: float | None = setting(
        None, "milliseconds of a step while requests wait for tokens: prompts get so little of it, "
        "an eighth of max_num_tokens at least, that steps do not last longer on average",
        above=0, at_most=60_000, shown_default="off",
    )  # fmt: skip
    prefill_budget: str | None = setting(
        None, "a policy of your own for the prompt tokens of a step, in place of max_step_ms",
        **policy("prefill_budget", "prefill_budget"),
    )  # fmt: skip
    max_model_len: int | None = setting(
        None, "prompt and output tokens of a request", at_least=2, shown_default="the model's"
    )
    max_queued_requests: int = setting(100_000, "unfinished requests of the engine", at_least=1)
    load_format: str = setting(
        "safetensors", "read the checkpoint, or random weights (dummy), for which a config.json is "
        "enough", choices=("safetensors", "dummy"),
    )  # fmt: skip
    seed: int = setting(
        0, "seed of requests that bring none, and of dummy weights", at_least=0,
        at_most=2**63 - 1, allowed="0..2**63-1",
    )  # fmt: skip
    overlap: bool | None = setting(
        None, "schedule and agree on step k+1 before step k is committed",
        shown_default="on where device is cuda",
    )  # fmt: skip
    cuda_graphs: bool | None = setting(
        None, "replay decode steps, each rank at its own size, and in steps with prefill all but "
        "attention; inspect says why not",
        shown_default="wherever all kernels in use can be captured",
    )  # fmt: skip
    poison_padding: bool = setting(
        False, "fill padded rows with NaN, to show that no result depends on them"
    )
    check_device_values: bool = setting(
        False, "read attention inputs back in every step and compare them with the host's copy; "
        "slow, and without CUDA graphs",
    )  # fmt: skip
    speculative_num_steps: int = setting(
        0, "tokens that a draft model proposes for each request in a step, for the target to "
        "verify; 0: none", at_least=0, at_most=MAX_DRAFTS, allowed=f"0..{MAX_DRAFTS}",
    )  # fmt: skip
    speculative_draft_model: str | None = setting(
        None, "directory of an EAGLE-3 head", shown_default="the model's own MTP layer",
        allowed="the path of a directory",
    )  # fmt: skip
    speculative_draft_vocab: int | None = setting(
        None, "token ids, from 0 on, that an MTP layer may propose", at_least=1, shown_default="all"
    )
    speculative_adaptive: bool = setting(
        False, "ranks choose in each step how many tokens to propose, by what was accepted"
    )
    speculative_draft_length: str | None = setting(
        None, "a policy of your own for that number, in place of speculative_adaptive",
        **policy("speculative_draft_length", "draft_length"),
    )  # fmt: skip
    speculative_forced_tokens: float | None = setting(
        None, "for measurements: emit so many tokens a verification on average, whatever was "
        "proposed; the text is meaningless", at_least=1, shown_default="off",
    )  # fmt: skip
    enable_return_routed_experts: bool = setting(
        False, "keep the experts that every token goes to, for requests with return_routed_experts"
    )
    start_timeout_s: float = setting(
        300.0, "seconds until all ranks must serve", above=0, at_most=MAX_TIMEOUT_S,
    )  # fmt: skip
    step_timeout_s: float = setting(
        60.0, "seconds that a rank waits for another in a step", above=0, at_most=MAX_TIMEOUT_S
    )
    flight_dump_dir: str | None = setting(
        None, "directory for the flight record that is written when a rank fails or hangs", allowed=
        "the path of a directory", shown_default="a new one in the system's temporary directory",
    )  # fmt: skip
    hang_timeout_s: float = setting(
        4.0, "seconds without an answer from a rank's process, while others answer, or on GPUs "
        "without the end of a step, after which it counts as lost", above=0, at_most=MAX_TIMEOUT_S,
    )  # fmt: skip
    max_recoveries: int = setting(
        5, "times within a minute that lost ranks are replaced and their requests go on; then, and "
        "always with 0, a lost rank fails the engine", at_least=0,
    )  # fmt: skip
    min_dp_size: int | None = setting(
        None, "ranks that go on without the others while lost ones can not be replaced; memory "
        "for their larger shares of the experts is set aside", at_least=1, shown_default="dp_size",
    )  # fmt: skip
    standby_ranks: int = setting(
        0, "processes that wait, warm, to take the place of a lost rank; not with launcher thread",
        at_least=0, at_most=64,
    )  # fmt: skip
    host_weights: bool = setting(
        False, "keep each rank's weights in memory of the host too, for its successor; Linux only"
    )
    inject: str | None = setting(
        None, "for tests and experiments: faults that happen to ranks, as "
        "rank=2,step=50,kind=kill; docs/recovery.md has all kinds", allowed=ALLOWED,
    )  # fmt: skip
    torch_threads: int | None = setting(
        None, "threads of a CPU rank", at_least=1, at_most=4096, shown_default="cores / dp_size"
    )
    log_level: str = setting(
        "warning", "what ranks, and the command line, write to stderr: at info the choices made at "
        "start, why, and faults", choices=("debug", "info", "warning", "error"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_speculation()
        self._check_faults()
        ok = self.prefix_caching or not self.kv_events
        require(ok, "kv_events", self.kv_events, "False without prefix_caching")
        if (transport := TRANSPORTS.get(self.collective)) is not None:  # else auto
            check_transport(transport, self.device, self.launcher, self.ranks_per_gpu)
        ok = (self.min_dp_size or 1) <= self.dp_size
        require(ok, "min_dp_size", self.min_dp_size, f"at most dp_size {self.dp_size}")
        ok = self.prefill_budget is None or self.max_step_ms is None
        require(ok, "prefill_budget", self.prefill_budget, "None with max_step_ms")
        ok = not self.standby_ranks or self.launcher != "thread"
        require(ok, "standby_ranks", self.standby_ranks, "0 with launcher thread")
        feeds, limit = 1 + self.speculative_num_steps, self.max_num_tokens
        why = f"a decoding request feeds {feeds} to a step"
        require(feeds <= limit, "max_num_tokens", limit, f"at least {feeds}: {why}")
        most = f"at most {limit // feeds}: {why}, of max_num_tokens {limit}"
        ok = self.max_num_requests <= limit // feeds
        require(ok, "max_num_requests", self.max_num_requests, most)

    def copied(self) -> EngineConfig:
        """The configuration as it is now, checked again; a subclass is left behind."""
        return EngineConfig(**{s.name: getattr(self, s.name) for s in settings_of(EngineConfig)})

    @property
    def tells_kv_events(self) -> bool:
        """Whether ranks tell of their prefix caches, to users or for routing."""
        named = isinstance(self.routing, PolicyName)
        return self.kv_events or named or self.routing == "prefix_aware"

    @property
    def programs(self) -> tuple[Program, ...]:
        """The step programs that its ranks choose from, alike."""
        varies = self.speculative_adaptive or self.speculative_draft_length is not None
        steps = self.speculative_num_steps
        return speculative_programs(steps, varies) if steps else SERVING_PROGRAMS

    @property
    def depth(self) -> int:
        """Steps that may be launched and not yet committed when the next one is scheduled."""
        return int(self.device == "cuda" if self.overlap is None else self.overlap)

    @property
    def faults(self) -> tuple[Fault, ...]:
        return read_faults(self.inject, self.dp_size)

    def _check_faults(self) -> None:
        for fault in self.faults:
            ok = self.launcher != "thread" or fault.kind not in ENDS_PROCESS
            allowed = "launcher ray or local: with launcher thread it would end this process"
            require(ok, f"{FIELD}: kind", fault.kind.value, allowed)

    def _check_speculation(self) -> None:
        steps, forced = self.speculative_num_steps, self.speculative_forced_tokens
        for name in ("draft_model", "draft_vocab", "adaptive", "forced_tokens", "draft_length"):
            value, field = getattr(self, f"speculative_{name}"), f"speculative_{name}"
            require(bool(steps) or not value, field, value, "nothing without speculative_num_steps")
        own = self.speculative_draft_length
        ok = own is None or not self.speculative_adaptive
        require(ok, "speculative_draft_length", own, "None with speculative_adaptive")
        ok = forced is None or forced <= 1 + steps
        require(ok, "speculative_forced_tokens", forced, f"None or 1..{1 + steps}")
