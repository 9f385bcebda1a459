"""The Ray cluster that the ranks run on: its address, this process's connection, its errors."""
