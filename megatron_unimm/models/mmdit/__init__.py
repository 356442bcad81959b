"""Diffusion transformers with a text and an image stream (MMDiT: SD3, arXiv 2403.03206; FLUX)."""
