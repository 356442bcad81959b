"""MMCORE's last stage: reinforcement learning of the diffusion transformer (section 3.2), as Flow-GRPO (arXiv
2505.05470)."""
