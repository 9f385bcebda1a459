"""report.html: what a run or a recorded trace shows, as one page that needs nothing else."""
