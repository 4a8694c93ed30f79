"""Are these the same weights?  Fingerprints of one checkpoint, differences between two."""
