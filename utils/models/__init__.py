"""Models: the retriever's encoder, the summarizer, their losses and tokenizers."""
