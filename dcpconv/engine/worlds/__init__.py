"""Processes that do one thing together, on one host or many: which one this is, where they meet,
and how they look after each other."""
