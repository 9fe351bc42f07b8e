"""Failures named and bounded: what every rank is doing, who holds the others up, and how the job ends.

Beside each rank runs a small process, its *sentinel*, which needs nothing from the rank: it reads the rank's
progress from shared memory, sees whether the rank is dead or stopped, can have its stacks written although
its interpreter hangs, and can end it. Sentinels report to the *hub*, in the sentinel of rank 0, which
decides who is to blame. Imports neither torch nor plans, so a sentinel starts in a twentieth of a second.
"""
