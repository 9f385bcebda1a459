"""Products with e4m3 matrices that stay so in memory."""
