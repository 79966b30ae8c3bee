"""Progressive resizing: the size schedule, and the phases of a training that it defines."""
