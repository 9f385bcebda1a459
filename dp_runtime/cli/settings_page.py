"""Writes docs/settings.md: `python -m dp_runtime.cli.settings_page > docs/settings.md`."""

from __future__ import annotations

from dp_runtime.config import EngineConfig
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.settings import settings_of
from dp_runtime.server.config import ServerConfig

HEAD = """\
# Settings

<!-- python -m dp_runtime.cli.settings_page > docs/settings.md -->

Each field of `EngineConfig` is also a flag of `dp-runtime generate`, `serve`, `bench` and
`inspect`: `max_num_requests` is `--max-num-requests`, a bool has a `--no-` form.
"""
PARAMS = """
A request's `SamplingParams`, which are also fields of a line of a prompt file; there the keys of
`logit_bias` are texts, as JSON has no others:
"""


SERVER = """
The server's own settings are flags of `dp-runtime serve`:
"""


def settings_page() -> str:
    return "\n".join(
        [
            HEAD,
            *_table(EngineConfig),
            PARAMS,
            *_table(SamplingParams),
            SERVER,
            *_table(ServerConfig),
            "",
        ]
    )


def _table(owner: type) -> list[str]:
    rows = [
        f"| `{item.name}` | {item.shown_default} | {item.setting.doc} | {item.allowed} |"
        for item in settings_of(owner)
    ]
    return [f"| `{owner.__name__}` | default | | allowed |", "|---|---|---|---|", *rows]


if __name__ == "__main__":
    print(settings_page(), end="")
