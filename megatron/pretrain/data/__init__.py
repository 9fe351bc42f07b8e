"""Micro batches and batches of documents for this program."""
