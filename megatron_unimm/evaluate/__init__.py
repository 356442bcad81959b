"""Suites that score a model, from a checkpoint or while it trains."""
