"""Fixtures that tests of the whole runtime share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from tests.checkpoints import tiny_checkpoint
from tests.product_cases import CHECKPOINTS
from tests.reference import Reference
from tests.speculative_cases import DRAFTED, Drafted

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Ranks that are threads share this process; more threads than cores only slow them down."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """The oracle of a checkpoint by its name in CHECKPOINTS, made at its first use."""

    @cache
    def make(name: str) -> Reference:
        architecture, overrides = CHECKPOINTS[name]
        path = tmp_path_factory.mktemp("checkpoints") / name
        return Reference(tiny_checkpoint(path, architecture, **overrides))

    return make


@pytest.fixture(scope="session")
def drafted_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Drafted]:
    """A checkpoint with a draft model by its name in DRAFTED, made at its first use."""
    return cache(lambda name: DRAFTED[name](tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def oracle_of(drafted_of: Callable[[str], Drafted]) -> Callable[[str], Reference]:
    """The oracle of a checkpoint with a draft model, which it does not read."""
    return cache(lambda name: Reference(drafted_of(name).model))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local cluster that engines of all tests join."""
    import ray

    os.environ["RAY_AUTH_MODE"] = "token"
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
