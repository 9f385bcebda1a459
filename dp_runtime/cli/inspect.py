"""`inspect`: what would run."""

from __future__ import annotations

import argparse

import torch

from dp_runtime.cli.model_choice import config_from
from dp_runtime.cli.output import print_line
from dp_runtime.startup.devices import resolve_device
from dp_runtime.startup.inspection import describe


def inspect(options: argparse.Namespace) -> None:
    """Print what would run: shapes, bytes per rank, backend, and why."""
    config = resolve_device(config_from(options), torch.cuda.device_count(), "this host")
    print_line(describe(config, config.device))
