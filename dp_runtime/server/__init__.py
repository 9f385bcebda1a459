"""The HTTP server: OpenAI's endpoints and those that engines share, over an AsyncEngine."""
