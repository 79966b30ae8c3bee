"""The cost model of `pipeline capacity`: the time of a training step and its parts (docs/capacity.md)."""
