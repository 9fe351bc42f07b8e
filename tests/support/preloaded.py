"""What the server of :mod:`ranks` has imported before it forks."""

import gc

# Imports make many objects and no garbage. Nor need ranks look through them: to do so copies their pages.
gc.disable()

import models  # noqa: E402, F401
import training_worker  # noqa: E402, F401

gc.freeze()
gc.enable()
