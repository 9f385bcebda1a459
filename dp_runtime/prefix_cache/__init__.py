"""Pages that requests with the same beginning share: their names, and which a rank has."""
