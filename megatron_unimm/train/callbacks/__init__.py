"""Everything that happens around the steps."""
