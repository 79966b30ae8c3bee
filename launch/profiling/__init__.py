"""`--profile`: profile some optimizer steps, and the stages of the loader with them (docs/profiling.md)."""
