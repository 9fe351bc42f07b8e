"""Execution of one rank's share of a plan."""
