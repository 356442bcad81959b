"""What launchers/shapes_world.sh asks of a recipe of the Shapes world, a line each: the imported models that it starts
from, the kinds of data that it reads, its stages with their steps, and those that learn from a frozen VLM's words.

python tools/shapes_plan.py configs/mmcore/shapes.yaml [KEY=VALUE]...
"""

import sys
from pathlib import Path

from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.methods import PathwayDiffusionConfig
from megatron_unimm.config.recipe import Recipe
from megatron_unimm.errors import UserError
from megatron_unimm.train.log import setup_logging


def plan(recipe: Recipe) -> list[str]:
    """``base DIR``, ``generator DIR`` where there is one, ``data KIND...``, ``stage NAME STEPS`` of each, and ``cached
    STAGE`` of those whose frozen VLM need not run in each step (data.condition_cache)."""
    setup_logging()  # before Megatron-Core is imported, which warns
    from megatron_unimm.train.caches import need_of_vlm

    stages = list(recipe.stages.values())
    kinds = {name for stage in stages for name, source in stage.data.sources.items() if source is not None}
    lines = [f"base {stages[0].base_checkpoint}", f"data {' '.join(sorted(kinds))}"]
    generators = [stage.generator_checkpoint for stage in stages if stage.generator_checkpoint]
    lines += [f"generator {generators[0]}"] if generators else []
    for stage in stages:
        if stage.train.steps is None:
            what = "is not set; recipes of the Shapes world count in steps"
            raise UserError(f"stages.{stage.name}.train.steps", what)
        lines.append(f"stage {stage.name} {stage.train.steps}")
        if isinstance(stage.method, PathwayDiffusionConfig) and not need_of_vlm(stage):
            lines.append(f"cached {stage.name}")
    return lines


def main() -> int:
    try:
        lines = plan(load_recipe(Path(sys.argv[1]), sys.argv[2:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
