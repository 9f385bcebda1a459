"""Processes that wait, warm, for the number of a rank that is lost."""
