"""What runs in each API server: from a request to a merge that is ready on every worker."""
