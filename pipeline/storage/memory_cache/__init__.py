"""The memory cache: decoded images in memory that the processes of a node share."""
