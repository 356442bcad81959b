"""MMCORE's second stage: the diffusion transformer behind the VLM (section 3.2)."""
