"""What clients send, as models that FastAPI checks and describes."""
