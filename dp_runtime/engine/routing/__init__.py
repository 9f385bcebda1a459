"""Which rank a request goes to, and which ranks there are."""
