"""HTTP beneath the endpoints: who listens, connections, and what every request meets first."""
