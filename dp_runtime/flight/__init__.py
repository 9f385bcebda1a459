"""The flight recorder: what every rank did in its last steps, and who was odd when one failed."""
