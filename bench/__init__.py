"""Benchmarks: agreement first, then time, ours beside the peer's on the same inputs. See bench/README.md."""
