"""The loop, shared by all methods."""
