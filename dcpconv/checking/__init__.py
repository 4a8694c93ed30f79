"""Says whether a checkpoint fits a naming, a config, a key list or a live model."""
