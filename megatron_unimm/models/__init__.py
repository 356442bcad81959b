"""Models on Megatron-Core: vision encoders, the decoder, heads. Each file reads like its figure; parallelism comes
with the parts."""
