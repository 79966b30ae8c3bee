"""What people see of a run: metrics, log lines and live view, experiment trackers, goodput, and curves."""
