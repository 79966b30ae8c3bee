"""Environment of a process: ranks, network, CPU affinity, device peaks and library versions."""
