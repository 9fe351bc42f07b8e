"""Lengths of the documents of an indexed dataset. No torch."""
