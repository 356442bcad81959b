"""SPAR (arXiv 2606.23041): a tokenizer that teaches its own diffusion model, with dynamic token routing."""
