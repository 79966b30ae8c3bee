"""`pipeline capacity`: predict the throughput on several numbers of nodes, and what limits it (docs/capacity.md)."""
