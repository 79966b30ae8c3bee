"""A bounded cache of downloaded files, shared by the processes of a node."""
