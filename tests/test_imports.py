"""Who may import whom, and what a CPU run never loads."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@cache
def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
            names.add(node.module)
    return names


def offenders(package: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in imports(path)
        if name.startswith(forbidden)
    ]


def test_the_runtime_imports_neither_ray_nor_torch_distributed() -> None:
    assert offenders("dp_runtime", ("ray", "torch.distributed")) == []


def test_imports_go_down_only_but_for_the_engine_s_ranks() -> None:
    upward = offenders("dp_runtime", ("workers", "collectives"))
    assert set(upward) <= {
        "dp_runtime/engine/rank_group.py: workers",
        "dp_runtime/engine/rank_group.py: workers.start",
    }
    assert offenders("collectives", ("workers", "ray")) == []


def test_actors_are_started_in_one_place() -> None:
    users = {line.split(":")[0] for line in offenders("workers", ("ray",))}
    assert all(user.startswith(("workers/ray_group.py", "workers/ray_cluster/")) for user in users)


def test_flashinfer_is_imported_by_its_backends_only() -> None:
    for package in ("dp_runtime", "workers", "collectives"):
        users = {line.split(":")[0] for line in offenders(package, ("flashinfer",))}
        assert all(user.startswith("dp_runtime/attention/") for user in users)


OWN = {"dp_runtime", "workers", "collectives", "tests"}
BROUGHT = {"triton", "grpcio"}  # by torch, and by ray[default]
EXTRAS = {  # beside those that every installation has
    "dp_runtime/server": {"serve", "kv-events"},
    "dp_runtime/chat": {"serve"},
    "dp_runtime/cli": {"serve"},
    "dp_runtime/metrics": {"serve"},
    "dp_runtime/structured": {"structured"},
    "dp_runtime/vision": {"vision"},
    "dp_runtime/attention": {"gpu"},
    "dp_runtime/kernels": {"gpu"},
    "dp_runtime/experiments": {"experiments"},
    "workers/ray_cluster": {"serve"},  # to read metrics, where they are exported
}


def test_what_is_imported_is_listed_in_pyproject() -> None:
    """By name, not only as a requirement of what is listed: that may change with its version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {name: named(given) for name, given in project["optional-dependencies"].items()}
    distributions = packages_distributions()
    for package in ("dp_runtime", "workers", "collectives"):
        for path in (ROOT / package).rglob("*.py"):
            parent = "/".join(path.relative_to(ROOT).parts[:2])
            allowed = named(project["dependencies"]) | BROUGHT
            allowed = allowed.union(*(known[extra] for extra in EXTRAS.get(parent, ())))
            tops = {name.split(".")[0] for name in imports(path)} - OWN - sys.stdlib_module_names
            for top in tops:
                found = {normal(name) for name in distributions.get(top, [top])}
                assert found & allowed, f"{path.relative_to(ROOT)} imports {top}"


def named(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\s\[<>=;]", each, maxsplit=1)[0]) for each in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


CPU_RUN = """
import sys
import dp_runtime
print(*sys.modules)

import logging
for name in ("dp_runtime", "workers", "collectives"):
    logging.getLogger(name + ".part").info("silent")
    logging.getLogger(name + ".part").warning("seen")
    assert not logging.getLogger(name).handlers
assert not logging.getLogger().handlers

sys.modules["flashinfer"] = sys.modules["triton"] = None  # an import of them fails from here on
from dp_runtime import Engine, EngineConfig, SamplingParams
from tests.checkpoints import tiny_checkpoint
from workers.messages import Rendezvous
from workers.worker import Worker
model, meeting = str(tiny_checkpoint(sys.argv[1])), sys.argv[2]
config = dict(device="cpu", max_model_len=64, torch_threads=1)
worker = Worker(0, EngineConfig(model, launcher="local", **config), "cpu")  # a rank's own process
worker.prepare()
worker.load()
worker.join(Rendezvous("shared_memory", meeting))
worker.stop()
with Engine(EngineConfig(model, dp_size=2, launcher="thread", **config)) as engine:
    out, = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
assert len(out.token_ids) >= 1
print(*sys.modules)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A user's program in an interpreter of its own."""
    room = tmp_path_factory.mktemp("program")
    command = [sys.executable, "-c", CPU_RUN, str(room / "model"), str(room / "meeting")]
    return subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True)


@pytest.mark.parametrize("module", ["flashinfer", "ray", "transformers", "triton"])
def test_importing_the_runtime_is_light(
    module: str, program: subprocess.CompletedProcess[str]
) -> None:
    imported = program.stdout.splitlines()[0].split()
    assert "dp_runtime" in imported
    assert module not in imported


def test_a_user_s_program_sees_warnings_only_and_its_logging_is_left_alone(
    program: subprocess.CompletedProcess[str],
) -> None:
    assert program.stderr.splitlines()[:3] == ["seen"] * 3
    assert "silent" not in program.stderr


def test_a_cpu_run_never_imports_flashinfer_triton_or_ray(
    program: subprocess.CompletedProcess[str],
) -> None:
    loaded = program.stdout.splitlines()[-1].split()
    assert "workers.worker" in loaded
    assert "ray" not in loaded
