"""Where and with what an experiment ran, for whoever reads its results later."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("dp-runtime", "torch", "numpy", "ray", "flashinfer-python", "triton")
HOME = Path(__file__).parents[2]  # the checkout, if it is one
GPU_FIELDS = "name,driver_version,memory.total,clocks.max.sm,power.limit"
ASK_S = 10.0


def describe_machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "gpus": _lines("nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader"),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the checkout's commit, marked where files differ from it."""
    if not (HOME / ".git").exists():
        return None
    commit = _lines("git", "-C", str(HOME), "rev-parse", "HEAD")
    changes = _lines("git", "-C", str(HOME), "status", "--porcelain", "--untracked-files=no")
    return f"{commit[0]}{' with changes' * bool(changes)}" if commit else None


def _lines(*command: str) -> list[str]:
    """Return what a program prints; nothing where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return []
    done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []
