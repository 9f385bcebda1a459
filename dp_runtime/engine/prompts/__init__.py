"""What a user gives as a prompt, read and copied."""
