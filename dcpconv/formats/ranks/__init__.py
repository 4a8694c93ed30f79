"""Checkpoints of one file per rank, as trainers leave them: read, never written."""
