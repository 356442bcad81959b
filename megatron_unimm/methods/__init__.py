"""One folder per paper. A method composes models and states its losses and stages; the loop, data and checkpoints
are shared."""
