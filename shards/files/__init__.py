"""Read and write files safely: durable writes, locks, private folders, retries."""
