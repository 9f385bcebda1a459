"""Results as files of one directory: tables, settings, and every run's requests and steps."""
