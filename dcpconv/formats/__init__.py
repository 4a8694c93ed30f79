"""One folder per form: a catalog from headers, and an outline of a result."""
