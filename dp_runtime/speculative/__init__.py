"""Where draft models and verification go; the passes they run in are in `dp_runtime.program`."""
