"""Fetches adapters from the hub, from stores and from servers, and keeps them on disk."""
