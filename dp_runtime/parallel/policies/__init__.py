"""Policies of the user's own: how they are named and read, and those that run on every rank."""
