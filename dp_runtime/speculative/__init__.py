"""Where draft models and verification go; the slots they run in are in `dp_runtime.program`."""
