"""`pipeline tune`: measure the fastest performance options of model and loader on this machine."""
