"""``python -m megatron_unimm.cli``, and so ``torchrun -m megatron_unimm.cli train ...``."""

from megatron_unimm.cli.main import entry

entry()
