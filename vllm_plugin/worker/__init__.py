"""What runs in each worker: copies of the sources, and the merges made from them."""
