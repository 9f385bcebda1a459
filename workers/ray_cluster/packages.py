"""This program's packages, for ranks on a cluster whose nodes may not have them."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from workers.ray_cluster.connection import is_client

PACKAGES = ("dp_runtime", "collectives", "workers")
_BROUGHT = "_ray_pkg_"  # in the names of directories that hold what a job has brought

_log = logging.getLogger(__name__)


def packages_for_ranks() -> dict[str, Any]:
    """Return a runtime environment with our packages, beside those that the job has brought.

    NOTE: an actor's is put on top of the job's, field by field; Ray uploads only the job's itself.
    """
    import ray

    root = Path(__file__).parents[2]
    if any(part.startswith(_BROUGHT) for part in root.parts):
        return {}  # the ranks inherit where we come from
    uploaded = _upload_by_task(root) if is_client() else _upload(root)
    brought = ray.get_runtime_context().runtime_env.get("py_modules") or ()
    return {"py_modules": list(dict.fromkeys([*uploaded, *brought]))}


def _upload(root: Path) -> list[str]:
    from ray._private.runtime_env.py_modules import upload_py_modules_if_needed

    ours = {"py_modules": [str(root / name) for name in PACKAGES]}
    with tempfile.TemporaryDirectory() as scratch:
        uploaded = upload_py_modules_if_needed(
            ours, include_gitignore=True, scratch_dir=scratch, logger=_log
        )
    return list(uploaded["py_modules"])


def _upload_by_task(root: Path) -> list[str]:
    """Have a task of the cluster upload them: a Ray Client can't once it is connected (2.60)."""
    import ray

    def upload(files: dict[str, bytes], packages: tuple[str, ...]) -> list[str]:
        import tempfile
        from pathlib import Path

        from ray._private.runtime_env.py_modules import upload_py_modules_if_needed

        with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as scratch:
            for name, content in files.items():
                Path(root, name).parent.mkdir(parents=True, exist_ok=True)
                Path(root, name).write_bytes(content)
            ours = {"py_modules": [str(Path(root, name)) for name in packages]}
            uploaded = upload_py_modules_if_needed(
                ours, include_gitignore=True, scratch_dir=scratch
            )
        return list(uploaded["py_modules"])

    paths = [path for name in PACKAGES for path in (root / name).rglob("*.py")]
    files = {str(path.relative_to(root)): path.read_bytes() for path in paths}
    found: list[str] = ray.get(ray.remote(num_cpus=0)(upload).remote(files, PACKAGES))
    return found
