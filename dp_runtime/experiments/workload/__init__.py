"""What an experiment asks for: arrivals, lengths, prompts, ranks, and published traces."""
