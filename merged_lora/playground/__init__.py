"""A page on which merges are tried: weights are dragged, and the answers of a server follow."""
