"""Checks of the nodes of a job before it starts: each node measures itself and its way to others, one place judges."""
