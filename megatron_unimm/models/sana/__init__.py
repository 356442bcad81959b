"""SANA, a diffusion transformer of linear attention (arXiv 2410.10629)."""
