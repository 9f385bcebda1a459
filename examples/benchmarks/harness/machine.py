"""What a benchmark prints about where it ran."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe(*packages: str) -> str:
    """Processor, cores, Python, and the versions of packages, in one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"machine: {cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"
