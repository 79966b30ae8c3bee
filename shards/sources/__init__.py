"""Where images come from: every source gives a `Scan`, and nothing after it knows which source it was."""
