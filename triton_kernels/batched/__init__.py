"""Merging deltas: groups of modules of one shape, merged together by batched linear algebra in torch."""
