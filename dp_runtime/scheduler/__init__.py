"""One rank's requests: their states, their pages, and the batches made of them."""
