"""A bounded cache of fetched files that the processes of a node share."""
