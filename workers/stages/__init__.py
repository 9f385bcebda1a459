"""What belongs to the stages of a rank."""
