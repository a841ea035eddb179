"""Data: reading and checking examples, documents and corpora; writing the hand-over."""
