"""From what the user typed to a source: opened, recognised and measured, from headers alone."""
