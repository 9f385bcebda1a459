"""ServerConfig: what an operator chooses about the HTTP server."""

from __future__ import annotations

from dataclasses import dataclass

from dp_runtime.chat.parsers import ReasoningParser, ToolParser
from dp_runtime.core.settings import check_settings, setting
from dp_runtime.errors import require
from dp_runtime.vision.image_processor import MAX_PIXELS

MAX_PORT = 65_535
MAX_WRITE_TIMEOUT_S = 86_400  # the kernel counts milliseconds in 31 bits
MAX_CHOICES = 65_536
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServerConfig:
    """Configuration of the server; every value is checked on construction (ValueError)."""

    host: str = setting(LOOPBACK, "address to listen on; 0.0.0.0 is every network of this host")
    port: int = setting(8000, "port to listen on; 0: a free one", at_least=0, at_most=MAX_PORT)
    served_model_name: str | None = setting(
        None, "name of the model in requests and answers", shown_default="the directory's"
    )
    api_key: str | None = setting(
        None,
        "key that clients must bring as a bearer token, except to /health, /ready and /metrics",
        shown_default="$DP_RUNTIME_API_KEY, which `ps` does not show, else none",
        secret=True,
    )
    admin_key: str | None = setting(
        None,
        "key that calls of /admin/ must bring; without one, nobody can change the ranks over HTTP",
        shown_default="$DP_RUNTIME_ADMIN_KEY, else none",
        secret=True,
    )
    generation_config: str = setting(
        "auto", "sampling parameters of requests that leave them out: those that the checkpoint's "
        "generation_config.json recommends, or none of them", choices=("auto", "none"),
    )  # fmt: skip
    chat_template: str | None = setting(
        None, "file with a Jinja template for chats", shown_default="the checkpoint's",
    )  # fmt: skip
    trust_request_chat_template: bool = setting(
        False, "let requests bring a template, which may run for as long as it likes"
    )
    tool_parser: str = setting(
        "auto",
        "how the model writes tool calls: as JSON (hermes, Qwen3) or as XML (qwen_xml, "
        "Qwen3-Coder); auto: what the chat template shows",
        choices=("auto", *ToolParser),
    )
    reasoning_parser: str = setting(
        "auto",
        "how the model marks what it thinks: between <think> and </think>, or not at all; "
        "auto: what the chat template shows",
        choices=("auto", *ReasoningParser),
    )
    unknown_fields: str = setting(
        "refuse", "what to do with fields that nobody reads", choices=("refuse", "ignore")
    )
    max_connections: int = setting(
        8192, "connections that are open at a time; for more, idle ones are closed, or they are "
        "answered 503 if none is idle", at_least=1,
    )  # fmt: skip
    max_in_flight: int = setting(
        4096, "requests that are answered at a time; more get 429", at_least=1
    )
    max_body_bytes: int = setting(2**24, "bytes of a request's body", at_least=1)
    max_body_values: int = setting(
        300_000, "values of a request's body, as its commas, brackets and braces count them; "
        "while a body is read, nobody else is served", at_least=1,
    )  # fmt: skip
    max_bytes_in_flight: int = setting(
        2**30, "bytes of the bodies of all requests in flight; more get 429", at_least=1
    )
    max_choices: int = setting(
        1024, "choices of a request: prompts times n", at_least=1, at_most=MAX_CHOICES
    )
    max_prompt_tokens: int = setting(
        2**20,
        "tokens of a request's prompts, n times each, and with prompt_logprobs so many times more",
        at_least=1,
    )
    max_images: int = setting(64, "images of a request", at_least=1)
    max_image_bytes: int = setting(
        2**23, "bytes of an image's file, of which base64 makes a third more in a body", at_least=1
    )
    max_file_pixels: int = setting(
        MAX_PIXELS, "pixels of an image as it comes, all of which are decoded before it is resized",
        at_least=1, at_most=MAX_PIXELS,
    )  # fmt: skip
    keep_alive_s: int = setting(
        65, "seconds that a connection may be idle after an answer", at_least=1
    )
    head_timeout_s: float = setting(
        60.0, "seconds to wait for a request's head, of a new connection or from its first byte; a "
        "client with hundreds of requests may send one seconds after it has connected", above=0,
    )  # fmt: skip
    read_timeout_s: float = setting(60.0, "seconds to wait for a request's body", above=0)
    write_timeout_s: float = setting(
        300.0, "seconds to wait for a client that takes nothing of its answer",
        above=0, at_most=MAX_WRITE_TIMEOUT_S,
    )  # fmt: skip
    drain_timeout_s: float = setting(
        30.0, "seconds that running requests get to end after SIGTERM or Ctrl-C", at_least=0
    )

    kv_events_endpoint: str | None = setting(
        None, "where KV events of all ranks are published over ZeroMQ, in vLLM's format; needs the "
        "extra kv-events", shown_default="nowhere", allowed="an endpoint, as tcp://*:5557",
    )  # fmt: skip
    kv_events_replay_endpoint: str | None = setting(
        None, "where subscribers ask for events that they missed", shown_default="nowhere",
        allowed="an endpoint, as tcp://*:5558",
    )  # fmt: skip
    kv_events_topic: str | None = setting(None, "topic of these events", shown_default="empty")

    def __post_init__(self) -> None:
        check_settings(self)
        ok = self.kv_events_replay_endpoint is None or self.kv_events_endpoint is not None
        needs = "nothing without kv_events_endpoint"
        require(ok, "kv_events_replay_endpoint", self.kv_events_replay_endpoint, needs)
