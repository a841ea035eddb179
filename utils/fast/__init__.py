"""Accelerations; each falls back to plain PyTorch or Transformers where it does not apply."""
