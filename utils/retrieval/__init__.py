"""Retrieval: ranking passages, and the training pairs of the retriever."""
