"""Values that travel: requests, batches, metadata, programs."""
