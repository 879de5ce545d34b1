"""What runs in each API server: from a request's text to a merge that every worker has ready."""
