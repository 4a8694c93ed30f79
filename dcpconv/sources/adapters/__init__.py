"""Adapters: low-rank and other additions to a base model's weights, read from headers alone."""
