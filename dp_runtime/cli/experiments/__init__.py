"""Commands of the laboratory: run a grid, replay a recording, make a report."""
