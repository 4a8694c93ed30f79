"""Fills live, possibly sharded models from a checkpoint; the only room that knows torch models."""
