"""Models on Hugging Face: their config.json, names and files, to a checkpoint of ours and back."""
