"""Tiny models for tests, and comparisons that say which tensor is wrong. Imported as ``helpers``: tests/ is on the path."""
