"""A GPT in pieces: attention backends, norms, layer specs, and the model split into segments."""
