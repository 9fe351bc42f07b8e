"""A GPT in pieces: attention backends, norms, layer specs, and the model split into segments."""

from helixpipe.layers.deferred_compile import import_megatron_core

# Before any other module imports it.
import_megatron_core()
