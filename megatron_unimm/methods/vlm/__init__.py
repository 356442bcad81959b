"""What methods share that train a vision-language model on packed conversations."""
