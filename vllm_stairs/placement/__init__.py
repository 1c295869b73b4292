"""The draft on a device of its own: its cluster, messages and bookkeeping. Imports no vLLM."""
