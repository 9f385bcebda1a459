"""The laboratory: a workload over a grid of settings and policies (docs/experiments.md)."""

from dp_runtime.experiments.experiment import Experiment
from dp_runtime.experiments.report.page import write_report
from dp_runtime.experiments.results.run_files import read_requests, read_steps
from dp_runtime.experiments.run_experiment import Outcome, run_experiment

__all__ = ["Experiment", "Outcome", "read_requests", "read_steps", "run_experiment", "write_report"]
