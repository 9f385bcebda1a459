"""What ranks tell the driver of themselves, beside the progress of requests."""
