"""The host that a process runs on: what it may use, and memory that its processes share."""
