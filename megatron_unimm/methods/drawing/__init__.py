"""What methods share that train a diffusion transformer to draw pictures."""
