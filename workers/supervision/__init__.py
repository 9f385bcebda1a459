"""Keeps the ranks of a group in service, through faults and changes, and ends them with it."""
