"""Agreement of ranks on each step, and the exchange of rows between them."""
