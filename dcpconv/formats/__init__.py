"""How bytes are stored: one module per form, each reading a Catalog and drawing an Outline."""
