"""Ranks of one host that meet in shared memory."""
