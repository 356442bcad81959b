"""Pipelines for exported folders: transformers' and diffusers' classes, without Megatron-Core."""
