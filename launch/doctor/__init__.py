"""`pipeline doctor`: find slow and misconfigured hosts before a long run."""
