"""When every operation of a plan runs, given costs, and what each rank holds meanwhile."""
