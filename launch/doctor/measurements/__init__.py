"""What `pipeline doctor` measures: devices, hosts, the network between them, and the input."""
