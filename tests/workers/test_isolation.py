"""Who can run code in the ranks: nobody without the token, and nothing that lies about."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workers.engines import REPOSITORY, SHORT, engine

OPEN = """
import sys, ray
from dp_runtime import Engine, EngineConfig
with Engine(EngineConfig(sys.argv[1], device="cpu", num_pages=1100)) as engine:
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.readline()
    print(len(engine.generate([[1, 2]])[0].token_ids), flush=True)
"""
STRANGER = """
import sys, ray
from ray._private import ray_constants
ray_constants.ENABLE_RAY_CLUSTER = False  # else Ray turns loopback into another address
ray.init(address=sys.stdin.readline().strip(), log_to_driver=False, configure_logging=False)
print("ran", ray.get(ray.remote(num_cpus=0)(lambda: 1).remote(), timeout=200))
"""


def environment(home: Path) -> dict[str, str]:
    """This one without anything that Ray reads of the user: another user's."""
    rest = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    rest["RAY_TMPDIR"] = os.environ["RAY_TMPDIR"]  # where clusters of tests lie is no secret
    once = {"RAY_gcs_server_port_wait_time_s": "1"}  # seconds; else Ray tries 20 times to get in
    return rest | once | {"HOME": str(home), "PYTHONPATH": str(REPOSITORY)}


@pytest.mark.ray
def test_a_stranger_can_not_use_a_cluster_that_an_engine_started(
    model: Path, tmp_path: Path
) -> None:
    homes = [tmp_path / name for name in ("owner", "stranger")]
    for home in homes:
        home.mkdir()
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    owner = subprocess.Popen(
        [sys.executable, "-c", OPEN, str(model)],
        env=environment(homes[0]), text=True, **pipes | {"stderr": None},
    )  # fmt: skip
    stranger = subprocess.Popen(  # it imports ray while the cluster starts
        [sys.executable, "-c", STRANGER], env=environment(homes[1]), text=True, **pipes
    )
    with owner, stranger:
        assert owner.stdout is not None
        address = owner.stdout.readline().strip()
        assert ":" in address, "the engine has started its cluster"
        shown, errors = stranger.communicate(address + "\n", timeout=200)
        rest, _ = owner.communicate("go on\n", timeout=200)
    assert stranger.returncode != 0
    assert "ran" not in shown
    assert "authenticat" in errors.lower()
    assert int(rest) > 0, "and the engine serves"


def test_nothing_in_the_repository_switches_authentication_off() -> None:
    places = ["dp_runtime", "workers", "collectives", "examples", ".ci", "launch.py"]
    found = subprocess.run(
        ["grep", "-rnE", "RAY_AUTH_MODE.*disabled", *places],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.stdout == ""


def test_local_ranks_import_nothing_from_the_working_directory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    planted = f"open({str(ran)!r}, 'w').close()\nraise ImportError('planted')\n"
    for name in ("tqdm.py", "psutil.py"):
        (tmp_path / name).write_text(planted)
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "__init__.py").write_text(planted)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with engine(model, "local", dp_size=1) as one:
        assert len(one.generate([[1, 2]], SHORT)[0].token_ids) == SHORT.max_tokens
    assert not ran.exists()


def test_a_package_of_another_project_under_our_name_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "__init__.py").touch()
    code = "from dp_runtime import *; Engine(EngineConfig('x', launcher='thread', device='cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"the package 'workers' that Python finds first is {tmp_path / 'workers'}" in last
