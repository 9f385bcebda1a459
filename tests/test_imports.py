"""Who may import whom, and what a CPU run never loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
    assert users == {"workers/ray_group.py"}


def test_flashinfer_is_imported_by_its_backends_only() -> None:
    for package in ("dp_runtime", "workers", "collectives"):
        users = {line.split(":")[0] for line in offenders(package, ("flashinfer",))}
        assert all(user.startswith("dp_runtime/attention/") for user in users)


@pytest.mark.parametrize("module", ["flashinfer", "ray", "transformers", "triton"])
def test_importing_the_runtime_is_light(module: str) -> None:
    code = f"import sys, dp_runtime; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_cpu_run_never_imports_flashinfer_triton_or_ray(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["flashinfer"] = sys.modules["triton"] = None  # an import of them fails from here on
from dp_runtime import Engine, EngineConfig, SamplingParams
from tests.checkpoints import tiny_checkpoint
model = str(tiny_checkpoint({str(tmp_path)!r}))
with Engine(EngineConfig(model, dp_size=2, launcher="thread", max_model_len=64)) as engine:
    out, = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
assert len(out.token_ids) >= 1
assert not any(name == "ray" or name.startswith("ray.") for name in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert run.returncode == 0


def test_a_cpu_rank_in_a_process_of_its_own_never_imports_them(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["flashinfer"] = sys.modules["triton"] = None
from dp_runtime import EngineConfig
from tests.checkpoints import tiny_checkpoint
from workers.messages import MeetingPoint
from workers.worker import Worker
config = EngineConfig(
    str(tiny_checkpoint({str(tmp_path / "model")!r})), launcher="local", device="cpu",
    max_model_len=64, torch_threads=1,
)
worker = Worker(0, config, "cpu")
worker.prepare()
worker.load()
worker.serve(MeetingPoint("shared_memory", {str(tmp_path / "meeting")!r}))
worker.stop()
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert run.returncode == 0
