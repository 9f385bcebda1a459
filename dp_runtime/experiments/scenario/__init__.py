"""What happens to ranks in a run, by script: stragglers, pauses, kills, drains, resizes."""
