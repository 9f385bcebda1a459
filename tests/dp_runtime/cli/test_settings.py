"""Settings: written once in the config, read by checks, flags and documents."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dp_runtime.cli
from dp_runtime.cli.flags import add_flags, given_fields
from dp_runtime.cli.generate import SAMPLING_FLAGS
from dp_runtime.cli.model_choice import config_from
from dp_runtime.cli.settings_page import settings_page
from dp_runtime.config import EngineConfig
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.settings import settings_of

ROOT = Path(__file__).parents[3]


def test_docs_settings_md_is_current() -> None:
    shown = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert shown == settings_page(), "python -m dp_runtime.cli.settings_page > docs/settings.md"


def test_a_salt_of_the_prefix_cache_is_a_flag_of_generate() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, SamplingParams, SAMPLING_FLAGS)
    options = parser.parse_args(["--cache-salt", "mine"])
    assert given_fields(options, SamplingParams) == {"cache_salt": "mine"}


def test_every_field_of_the_config_is_described_and_a_flag() -> None:
    described = {item.name for item in settings_of(EngineConfig)}
    assert described == {name for name in EngineConfig.__dataclass_fields__ if name != "_"}
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineConfig)
    options = parser.parse_args(
        ["--dp-size", "4", "--no-overlap", "--kv-memory-fraction", "0.25", "--log-level", "info"]
    )
    assert given_fields(options, EngineConfig) == {
        "dp_size": 4, "overlap": False, "kv_memory_fraction": 0.25, "log_level": "info",
    }  # fmt: skip


def test_a_field_with_several_values_is_a_flag_that_may_be_repeated() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, SamplingParams, ("stop", "stop_token_ids", "seed"))
    options = parser.parse_args(["--stop", "a", "--stop", "b", "--stop-token-ids", "7"])
    given = given_fields(options, SamplingParams)
    assert given == {"stop": ["a", "b"], "stop_token_ids": [7]}
    assert "may be repeated" in parser.format_help()
    described = {item.name for item in settings_of(SamplingParams)}
    assert described == SamplingParams.__dataclass_fields__.keys()


def test_numbers_of_numpy_become_python_s_own() -> None:
    """A sum of small numpy integers would wrap."""
    fields: dict[str, Any] = {"max_tokens": np.uint8(100), "min_tokens": np.int8(3)}
    fields["top_p"] = np.float32(0.5)
    params = SamplingParams(**fields)
    values = (params.max_tokens, params.min_tokens, params.top_p, params.temperature)
    assert values == (100, 3, 0.5, 1.0)
    assert [type(value) for value in values] == [int, int, float, float]
    fields = {"dp_size": np.uint8(200), "step_timeout_s": np.float32(3)}
    config = EngineConfig("x", **fields)
    assert (type(config.dp_size), type(config.step_timeout_s)) == (int, float)
    assert config.dp_size * 100 == 20_000


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dp_size", 0, "dp_size: 0 is not allowed; an integer >= 1"),
        ("num_pages", 1, "num_pages: 1 is not allowed; None or an integer >= 2"),
        ("kv_memory_fraction", 1.5, "1.5 is not allowed; None or a number above 0, at most 1"),
        ("log_level", "loud", "'loud' is not allowed; one of debug, info, warning, error"),
        ("device", ["cpu"], "device: \\['cpu'\\] is not allowed; one of auto, cpu, cuda"),
        ("overlap", 1, "overlap: 1 is not allowed; None or a bool"),
    ],
)
def test_a_mistake_names_what_is_allowed(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig("x", **dict[str, Any]({name: value}))


def test_the_model_of_an_example_has_a_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny_moe", "tiny_hybrid", "tiny_vl"):
        config = config_from(argparse.Namespace(model=name))
        assert Path(config.model) == ROOT / "examples" / name / "checkpoint"
        assert config.dp_size == 1
    with pytest.raises(ValueError, match="'tiny' is not allowed; a directory, or one of tiny_hyb"):
        config_from(argparse.Namespace(model="tiny"))
    for path in ("./tiny", "/models/tiny"):  # which the ranks may see, if this process does not
        assert config_from(argparse.Namespace(model=path)).model == path
    (tmp_path / "tiny_moe").mkdir()
    assert config_from(argparse.Namespace(model="tiny_moe")).model == "tiny_moe"


def test_without_a_model_the_packaged_tiny_one_is_served() -> None:
    config = config_from(argparse.Namespace(device="cpu"))
    assert (config.dp_size, config.device) == (4, "cpu")
    names = {path.name for path in Path(config.model).iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json"}
    package = Path(dp_runtime.cli.__file__).parent
    assert package in Path(config.model).parents, "a wheel has what lies in its packages"
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    assert "tiny_model/*" in data["package-data"]["dp_runtime.cli"]
