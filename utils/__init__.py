"""Parts shared by the scripts: data, batching, search, models, metrics and training state."""
