"""Fixtures that tests of the whole runtime share."""

from __future__ import annotations

import gc
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling, Scheduling

from tests.checkpoints import tiny_checkpoint
from tests.product_cases import CHECKPOINTS
from tests.reference import Reference
from tests.speculative_cases import DRAFTED, Drafted

TESTS = Path(__file__).parent
settings.register_profile("unhurried", parent=settings(), deadline=None)  # others use the cores
settings.load_profile("unhurried")
USE_THE_CLUSTER = ("tests/workers/test_ray.py", "tests/test_processes.py")  # the fixture below
# Other engines on this machine are not of this session, nor is another xdist worker's.
os.environ["DP_RUNTIME_SESSION"] = f"test{os.getpid()}x{secrets.token_hex(4)}"
os.environ.pop("RAY_ADDRESS", None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Whoever runs in the background of a shell ignores SIGINT, and so would programs started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["RAY_AUTH_MODE"] = "token"  # read when ray is first imported
# transformers, the reference, is to compute in torch whatever kernels of others are installed: it
# looks for them when a model's module is first imported.
sys.modules.update(dict.fromkeys(("fla", "causal_conv1d")))  # type: ignore[arg-type]
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported


@pytest.hookimpl(optionalhook=True)  # a run without xdist is one process
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the whole suite in three processes, as many tests wait; what is named in this one."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    return 0 if named or torch.cuda.is_available() else 3


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    """Leave other ways than pyproject.toml's to xdist: engines on GPUs may run test by test."""
    return FilesTogether(config, log) if config.getoption("dist") == "loadfile" else None


class FilesTogether(LoadFileScheduling):  # type: ignore[misc]  # xdist is not typed
    """Gives a process whole files, for their fixtures, and all of one cluster of Ray.

    NOTE: xdist's own groups do nothing under pytest 9.2: they are told by a changed `_nodeid`.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "ray" if file in USE_THE_CLUSTER else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that all processes end at about the same time."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=_turn)


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of collections of garbage, which ranks ask for."""
    gc.collect()
    gc.freeze()


def _turn(item: pytest.Item) -> int:
    """Ray, then processes, then whole engines, then units; files stay in their order."""
    path = item.path.relative_to(TESTS.parent)
    if str(path) in USE_THE_CLUSTER:
        return 0
    return {"workers": 1, "collectives": 1, "dp_runtime": 3, "gpu": 4}.get(path.parts[1], 2)


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


@pytest.fixture(scope="session", autouse=True)
def temporary_directory(
    ray_directory: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Flight records of engines that fail end with the session."""
    tempfile.tempdir = str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = None


@pytest.fixture(scope="session")
def ray_cluster(ray_directory: None) -> Iterator[None]:
    """A local cluster that engines of all tests join."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
