"""GPU ranks of one host that write into each other's memory."""
