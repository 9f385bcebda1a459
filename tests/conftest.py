"""Fixtures that tests of the whole runtime share."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from functools import cache
from tempfile import TemporaryDirectory

import pytest
import torch

from tests.checkpoints import tiny_checkpoint
from tests.product_cases import CHECKPOINTS
from tests.reference import Reference
from tests.speculative_cases import DRAFTED, Drafted

# Other engines on this machine are not of this session, nor is another xdist worker's.
os.environ["DP_RUNTIME_SESSION"] = f"test{os.getpid()}x{secrets.token_hex(4)}"
os.environ.pop("RAY_ADDRESS", None)
os.environ["RAY_AUTH_MODE"] = "token"  # read when ray is first imported
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


@pytest.fixture(scope="session", autouse=True)
def ray_directory() -> Iterator[None]:
    """Clusters of this session keep to a directory of their own: "auto" of others finds none."""
    with TemporaryDirectory(prefix="dpr", ignore_cleanup_errors=True) as directory:
        os.environ["RAY_TMPDIR"] = directory  # short: the paths of its sockets have a limit
        yield


@pytest.fixture(scope="session")
def ray_cluster(ray_directory: None) -> Iterator[None]:
    """A local cluster that engines of all tests join."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
