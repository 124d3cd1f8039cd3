"""Sparse then Prune: Toward Efficient Vision Transformers (arXiv 2307.11988)."""
