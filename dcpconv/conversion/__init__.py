"""Converts a checkpoint into another form, naming or element type."""
