"""The typed configuration. See ``recipe.py`` for the whole and ``load.py`` for how files and overrides become one."""
