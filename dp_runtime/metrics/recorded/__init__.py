"""What a recording holds, and whether it can be so."""
