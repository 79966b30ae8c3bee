"""Load and save weights files, and load checkpoints of the released code and other tools."""
