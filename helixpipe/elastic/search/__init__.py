"""The search for an elastic plan: cutting and packing, grouping, recomputation."""
