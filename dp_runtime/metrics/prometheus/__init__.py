"""Metrics in Prometheus' text format; importing it needs the library prometheus_client."""
