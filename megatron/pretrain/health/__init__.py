"""What watches a run and what ends it."""
