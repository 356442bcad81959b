"""Checkpoints: Megatron-Core's torch_dist format, hashed and committed by a marker written last.

``store.py`` saves and loads training state and imports Megatron-Core; the other files serve conversion too, without it.
"""
