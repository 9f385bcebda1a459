"""From a config to a rank that is ready."""
