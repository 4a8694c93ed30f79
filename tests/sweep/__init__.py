"""Every architecture that the installed transformers can build tiny, through everything we do."""

STEPS = (
    "reference",
    "dcp",
    "torch",
    "files",
    "check",
    "live",
    "meta",
    "memory",
    "base",
    "damage",
    "namings",
)
"""What is proved of each, in order."""
