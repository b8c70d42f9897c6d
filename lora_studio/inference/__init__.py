"""Trying models out: a base with weighted adapters in memory, and its answers."""
