"""SPAR's joint training: a diffusion transformer in the tokenizer's latent space, which teaches it."""
