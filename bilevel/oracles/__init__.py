"""Bilevel problems and their oracles: losses, gradients, products, batches, and what is checked before use."""
