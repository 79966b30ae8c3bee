"""What ends or saves a run: preemption, watchdog, preflight checks and guards."""
