"""A GPT in pieces: attention backends, norms, layer specs, and the model split into segments."""

from helixpipe.layers.deferred_compile import import_megatron_core
from helixpipe.layers.optional_packages import hide_broken_packages

# Before any other module imports megatron.core.
hide_broken_packages()
import_megatron_core()
