"""SPAR's first stage: the dual-stream tokenizer."""
