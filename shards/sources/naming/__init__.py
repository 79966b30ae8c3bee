"""Derive splits, classes, and labels from the names of folders and files, and from lists."""
