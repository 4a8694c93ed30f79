"""Saving from the ranks of a trainer, straight into the files of a published checkpoint."""
