"""Checkpoints: loading, saving, files, shards, and reading without running code."""
