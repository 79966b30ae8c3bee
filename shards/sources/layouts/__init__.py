"""Source layouts, one module each, and their detection."""
