"""Everything that touches vLLM: the table of wrapped functions, and the wrappers by part of vLLM."""
