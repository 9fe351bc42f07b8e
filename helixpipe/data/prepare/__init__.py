"""Preparing token data on disk and checking it before training."""
