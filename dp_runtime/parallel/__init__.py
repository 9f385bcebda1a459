"""What ranks agree on, and how rows travel between them."""
