"""What the segments of a plan compute, and the contract that all of them meet."""
