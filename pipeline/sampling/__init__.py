"""Selection of classes and samples, and class-balanced sampling."""
