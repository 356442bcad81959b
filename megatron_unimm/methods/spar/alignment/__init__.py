"""SPAR's alignment: the routed language model says what the vision encoder sees."""
