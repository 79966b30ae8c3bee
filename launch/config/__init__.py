"""The training configuration: frozen dataclasses, TOML recipes and the command line."""
