"""Draft models; the passes they run in are in `dp_runtime.core.step_program`."""
