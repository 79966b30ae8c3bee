"""Recipes of this project: TOML files whose first comment says what, from where, how long, how accurate."""
