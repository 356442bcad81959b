"""Convert checkpoints: the same as ``unimm convert``, for those who look for it among the tools.

python tools/convert_checkpoint.py import --from Qwen2.5-VL-7B-Instruct --to checkpoints/qwen2_5_vl_7b
"""

import sys

from megatron_unimm.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["convert", *sys.argv[1:]]))
