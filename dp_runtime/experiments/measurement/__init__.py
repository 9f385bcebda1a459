"""One run of a point: its requests, its steps, and the figures of both."""
