"""What launchers/shapes_world.sh asks of a recipe of the Shapes world, a line each: the imported models that it starts
from, the kinds of data that it reads, and its stages with their steps.

python tools/shapes_plan.py configs/mmcore/shapes.yaml [KEY=VALUE]...
"""

import sys
from pathlib import Path

from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.recipe import Recipe
from megatron_unimm.errors import UserError


def plan(recipe: Recipe) -> list[str]:
    """``base DIR``, ``generator DIR`` where there is one, ``data KIND...``, and ``stage NAME STEPS`` of each."""
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
