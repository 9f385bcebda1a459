"""Products of few rows with matrices that are read while the kernel before still runs."""
