"""What chunks cost: the model, its fit to measurements, its file."""
