"""The process that plans the next batch while the present one trains."""
