"""Merging factors: a plan as tables, and one launch for all of its modules."""
