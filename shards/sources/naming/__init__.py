"""What names of folders, files and lists say: splits, classes and labels."""
