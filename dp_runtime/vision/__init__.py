"""Images: what a user gives, as patches; their features; their places and positions in a prompt."""
