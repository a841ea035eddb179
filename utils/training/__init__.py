"""Training: everything about a run that does not touch the model's forward pass or the data."""
