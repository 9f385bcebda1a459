"""CUDA graphs: whole passes, pieces of forwards, their inputs and their capture."""
