"""EngineConfig: everything a user chooses, checked before any process starts."""

from __future__ import annotations

from dataclasses import dataclass

from dp_runtime.core.program import MAX_DRAFTS, SERVING_PROGRAMS, Program, speculative_programs
from dp_runtime.errors import is_finite, is_int, require
from dp_runtime.parallel.padding import PaddingMode
from dp_runtime.parallel.transports import TRANSPORTS, Transport

CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "launcher": ("ray", "local", "thread"),
    "attention_backend": ("auto", "trtllm", "flashinfer", "torch_ref"),
    "kv_cache_dtype": ("auto", "fp8_e4m3"),
    "moe_sharding": ("ep", "tp"),
    "padding": tuple(mode.value for mode in PaddingMode),
    "routing": ("round_robin", "least_tokens", "least_padded_cost"),
    "load_format": ("safetensors", "dummy"),
    "collective": ("auto", *TRANSPORTS),
    "moe_backend": ("auto", "triton", "torch"),
}


@dataclass(frozen=True)
class EngineConfig:
    """Configuration of an engine; every value is checked on construction (ValueError).

    model: a Hugging Face directory, as the ranks see it. dp_size: number of ranks.
    ranks_per_gpu: ranks that share a GPU and meet in host memory, for experiments with more ranks
    than GPUs; not for speed. device "auto": cpu without any GPU, cuda with enough of them.
    dtype "auto": float32 on cpu, bfloat16 on cuda. launcher: Ray actors, spawned processes, or
    threads of this process (for tests). moe_sharding: experts by expert (ep) or by intermediate
    size (tp).
    num_pages counts the null page; None sizes the pool for max_num_requests sequences of
    max_model_len, within kv_memory_fraction (which a number of pages overrides) of the memory that
    weights, workspaces and activations leave of the device (None: 0.5 on cpu, 0.9 on cuda).
    max_num_requests and max_num_tokens are per rank and step.
    overlap schedules step k+1 before step k is committed (None: on cuda).
    cuda_graphs replays decode steps, and MoE stages of small steps with prefill, in both of which
    only real rows cross between GPUs (None: wherever the kernels in use can be captured).
    poison_padding fills padded rows with NaN, to show that no result depends on them.
    kv_cache_dtype "auto": that of the weights; fp8_e4m3: scales are the checkpoint's, else 1.0.
    check_device_values reads attention inputs back in every step and compares them (slow).
    speculative_num_steps: tokens that a draft model proposes for the target to verify in one step,
    0 for none; speculative_draft_model: a directory with an EAGLE-3 head (None: the MTP layer of
    the model itself). speculative_adaptive: in each step all ranks choose how many to propose, up
    to that number, from what was accepted. speculative_forced_tokens: for measurements, emit so
    many tokens a verification on average, whatever was proposed; the text is then meaningless.
    """

    model: str
    dp_size: int = 1
    ranks_per_gpu: int = 1
    device: str = "auto"
    dtype: str = "auto"
    launcher: str = "ray"
    ray_address: str | None = None
    attention_backend: str = "auto"
    kv_cache_dtype: str = "auto"
    collective: str = "auto"
    moe_sharding: str = "ep"
    moe_backend: str = "auto"
    padding: str = "max_len"
    routing: str = "least_tokens"
    page_size: int = 64
    num_pages: int | None = None
    kv_memory_fraction: float | None = None
    max_num_requests: int = 64
    max_num_tokens: int = 2048
    max_model_len: int | None = None
    max_queued_requests: int = 100_000
    load_format: str = "safetensors"
    seed: int = 0
    overlap: bool | None = None
    cuda_graphs: bool | None = None
    poison_padding: bool = False
    check_device_values: bool = False
    speculative_num_steps: int = 0
    speculative_draft_model: str | None = None
    speculative_adaptive: bool = False
    speculative_forced_tokens: float | None = None
    start_timeout_s: float = 300.0
    step_timeout_s: float = 60.0
    torch_threads: int | None = None

    def __post_init__(self) -> None:
        require(
            isinstance(self.model, str) and bool(self.model),
            "model",
            self.model,
            "the path of a directory",
        )
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            require(value in allowed, name, value, f"one of {', '.join(allowed)}")
        self._check_speculation()
        self._check_sizes()
        address = self.ray_address
        ok = address is None or (isinstance(address, str) and bool(address))
        require(ok, "ray_address", address, "None, auto, host:port or ray://host:port")
        for name in ("poison_padding", "check_device_values", "speculative_adaptive"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "a bool")
        for name in ("overlap", "cuda_graphs"):
            value = getattr(self, name)
            require(value is None or isinstance(value, bool), name, value, "None or a bool")
        transport = TRANSPORTS.get(self.collective)
        if transport is not None:  # else auto
            self._check_transport(transport)

    @property
    def programs(self) -> tuple[Program, ...]:
        """The step programs that its ranks choose from, alike."""
        steps = self.speculative_num_steps
        return speculative_programs(steps, self.speculative_adaptive) if steps else SERVING_PROGRAMS

    @property
    def depth(self) -> int:
        """Steps that may be launched and not yet committed when the next one is scheduled."""
        overlap = self.device == "cuda" if self.overlap is None else self.overlap
        return 1 if overlap else 0

    def _check_transport(self, transport: Transport) -> None:
        """ValueError if it does not go with the device, the launcher or ranks that share GPUs."""
        field, name = "collective", transport.name
        fits = self.device in ("auto", *transport.device_types)
        require(fits, field, name, f"{name} is for GPUs, not for device cpu")
        fits = transport.in_process == (self.launcher == "thread")
        require(fits, field, name, "in_process goes with launcher 'thread', and with no other")
        shares = self.device == "cuda" and self.ranks_per_gpu > 1
        require(
            transport.shares_gpus or not shares, field, name,
            f"with ranks_per_gpu {self.ranks_per_gpu} use auto, shared_memory or peer_to_peer: "
            "NCCL refuses two ranks on one GPU",
        )  # fmt: skip

    def _check_speculation(self) -> None:
        steps, model = self.speculative_num_steps, self.speculative_draft_model
        ok = is_int(steps) and 0 <= steps <= MAX_DRAFTS
        require(ok, "speculative_num_steps", steps, f"0..{MAX_DRAFTS}")
        ok = model is None or (isinstance(model, str) and bool(model))
        require(ok, "speculative_draft_model", model, "None or the path of a directory")
        forced = self.speculative_forced_tokens
        ok = forced is None or (is_finite(forced) and 1 <= forced <= 1 + steps)
        require(ok, "speculative_forced_tokens", forced, f"None or 1..{1 + steps}")
        for name, unset in (
            ("speculative_draft_model", None), ("speculative_adaptive", False),
            ("speculative_forced_tokens", None),
        ):  # fmt: skip
            value = getattr(self, name)
            needs = "nothing without speculative_num_steps"
            require(bool(steps) or value == unset, name, value, needs)

    def _check_sizes(self) -> None:
        sizes = ("dp_size", "ranks_per_gpu", "page_size", "max_num_requests", "max_num_tokens")
        for name in (*sizes, "max_queued_requests"):
            value = getattr(self, name)
            require(is_int(value) and value >= 1, name, value, "an integer >= 1")
        for name, least in (("num_pages", 2), ("max_model_len", 2), ("torch_threads", 1)):
            value = getattr(self, name)
            ok = value is None or (is_int(value) and value >= least)
            require(ok, name, value, f"None or an integer >= {least}")
        require(is_int(self.seed) and 0 <= self.seed < 2**63, "seed", self.seed, "0..2**63-1")
        feeds = 1 + self.speculative_num_steps
        require(
            self.max_num_requests * feeds <= self.max_num_tokens,
            "max_num_requests", self.max_num_requests,
            f"at most {self.max_num_tokens // feeds}: a decoding request feeds {feeds} of the "
            f"max_num_tokens {self.max_num_tokens} of a step",
        )  # fmt: skip
        fraction = self.kv_memory_fraction
        ok = fraction is None or (is_finite(fraction) and 0 < fraction <= 1)
        require(ok, "kv_memory_fraction", fraction, "None or a number above 0, at most 1")
        for name in ("start_timeout_s", "step_timeout_s"):
            value = getattr(self, name)
            require(is_finite(value) and value > 0, name, value, "a number of seconds above 0")
