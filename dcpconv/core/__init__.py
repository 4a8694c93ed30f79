"""Nouns that every room shares: errors, element types, catalog, layouts, numbers, outlines.

Pure data: nothing here opens a file.
"""
