"""The stages of a rank as values, and how far it is between them."""
