"""The ``unimm`` command: one thin file per subcommand. ``main.py`` joins them and turns errors into exit codes."""
