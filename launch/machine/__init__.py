"""What a process runs on: ranks, network, CPU affinity and device peaks."""
