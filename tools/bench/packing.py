"""Packing on a realistic mix of lengths: padding, and how even the work of ranks is.

    python tools/bench/packing.py --ranks 64 --rows-per-rank 2 --sequence-length 8192

Simulates steps of `train.global_batch_rows`, with what is left over carried on. Work is counted as the trainer counts
it for Qwen2.5-VL-7B: products with weights for every token of a row, padding included, and attention for every pair.
"""

import argparse
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_unimm.config.load import load_recipe
from megatron_unimm.data.length_mix import length_mix
from megatron_unimm.data.packing import deal_rows, fill_rows, plan_rows
from megatron_unimm.data.plan import OVERFILL
from megatron_unimm.models.flops import causal_pairs, decoder_work

RECIPE = "configs/orion/qwen2_5_vl_7b.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--rows-per-rank", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--sequence-length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    backbone = load_recipe(RECIPE).stages["sft"].model.backbone
    linear = decoder_work(backbone, options.sequence_length, 0).cost(trains=True, passes_gradient=True)

    def attention(length: int) -> float:
        return decoder_work(backbone, 0, causal_pairs((0, length))).cost(trains=True, passes_gradient=True)

    table = Table(
        "rows per rank", "samples", "padding", "max / mean work", "left over", "plan ms", "first fit: padding"
    )
    for rows_per_rank in options.rows_per_rank:
        draw, carried = length_mix(np.random.default_rng(0)), []
        num_rows = options.ranks * rows_per_rank
        padding, uneven, left_over, seconds, samples, naive = [], [], [], [], [], []
        for _ in range(options.steps):
            lengths = list(carried)
            while sum(lengths) < OVERFILL * num_rows * options.sequence_length:
                lengths.append(next(draw))
            start = time.perf_counter()
            costs = [attention(length) for length in lengths]
            rows, left = fill_rows(
                lengths,
                costs,
                num_rows=num_rows,
                sequence_length=options.sequence_length,
                alignment=1,
                packing=True,
                first=len(carried),
            )
            work = [linear + sum(costs[i] for i in row) for row in rows]
            totals = [sum(work[row] for row in share) for share in deal_rows(work, options.ranks)]
            seconds.append(time.perf_counter() - start)
            used = sum(lengths[i] for row in rows for i in row)
            padding.append(1 - used / (num_rows * options.sequence_length))
            uneven.append(max(totals) / np.mean(totals))
            left_over.append(len(left))
            samples.append(len(lengths) - len(left))
            plan = plan_rows(
                lengths,
                costs=costs,
                sequence_length=options.sequence_length,
                num_rows_multiple=options.ranks,
                alignment=1,
                packing=True,
            )
            naive.append(1 - sum(lengths) / (len(plan) * options.sequence_length))
            carried = [lengths[i] for i in left]
        table.add_row(
            str(rows_per_rank),
            f"{np.mean(samples):.0f}",
            f"{100 * np.mean(padding):.2f} % (worst {100 * max(padding):.2f} %)",
            f"{np.mean(uneven):.4f} (worst {max(uneven):.4f})",
            f"{np.mean(left_over):.0f} (most {max(left_over)})",
            f"{1000 * np.mean(seconds):.0f}",
            f"{100 * np.mean(naive):.1f} %",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
