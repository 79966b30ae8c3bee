"""Find the rank that holds the others back, and why."""
