"""SPAR's tokenizer: pictures to one compact grid of latents and back (arXiv 2606.23041)."""
