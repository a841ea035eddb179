"""Evaluation: ROUGE, retrieval scores and confidence intervals."""
