"""The public way to create loaders, and how they are iterated by epoch."""
