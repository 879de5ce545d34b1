"""Adapters on disk: how they are found, read, checked and written. Knows nothing of merging."""
