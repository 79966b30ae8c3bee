"""Start the processes of a training, on this machine or on several."""
