"""Keeps the ranks of a group in sight, and ends them with those who hold it."""
