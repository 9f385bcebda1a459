"""Engines on clusters that the program itself has started, and their ends; a process for each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workers.engines import REPOSITORY

pytestmark = [pytest.mark.ray, pytest.mark.slow]

COMMON = f"""
import os, sys
sys.path.insert(0, {str(REPOSITORY)!r})  # which no environment variable tells the ranks
import ray
from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.errors import RankFailed
SHORT = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=60_000, temperature=0.0, ignore_eos=True)
def engine(model=sys.argv[1], **fields):
    limits = dict(max_num_requests=4, num_pages=1100, torch_threads=1, device="cpu")
    return Engine(EngineConfig(model, **(limits | fields)))
def serves(one):
    return len(one.generate([[1, 2]], SHORT)[0].token_ids) == 3
def started_by_user(**options):
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, **options)
"""
SHARED = """
one, other = engine(), engine()
one.close()
assert serves(other)
other.close()
assert not ray.is_initialized()
last = engine()
handle = last.submit([1], LONG)
next(iter(handle))
ray.shutdown()
try:
    handle.result(30)
except RankFailed as error:
    assert "ray.shutdown()" in str(error), error
last.close()
assert not ray.is_initialized()  # nor did the end start Ray again
"""
JOB = """
os.makedirs("brought", exist_ok=True)
open("brought/__init__.py", "w").write("x = 1")
started_by_user(runtime_env={"py_modules": [os.path.abspath("brought")]})
link = os.path.relpath(sys.argv[1])  # of the driver: ranks have other working directories
with engine(link, dp_size=2) as one:
    assert serves(one)
assert ray.is_initialized()
@ray.remote(num_cpus=0)
def still_there():
    import brought
    return brought.x
assert ray.get(still_there.remote()) == 1
"""
ACTOR = """
started_by_user(runtime_env={"env_vars": {"PYTHONPATH": sys.path[0]}})
@ray.remote(num_cpus=2)  # all of them
class Holder:
    def serve(self, model):
        with engine(model, dp_size=2, start_timeout_s=100.0) as one:
            return serves(one)
assert ray.get(Holder.remote().serve.remote(sys.argv[1]))
"""


@pytest.mark.parametrize("script", [SHARED, JOB, ACTOR], ids=["shared", "job", "actor"])
def test_programs(script: str, model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + script, str(model)], cwd=tmp_path, capture_output=True,
        text=True, timeout=250, env=os.environ | {"RAY_AUTH_MODE": "token", "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
