"""State, steps and memory of ranks, and the log."""
