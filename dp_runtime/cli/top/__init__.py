"""`top`: a live table of a server's ranks, from what it tells over HTTP."""
