"""How much the kernels work on at a time."""

BLOCK = 1 << 20
"""Elements. Their temporaries stay in the cache and are not allocated anew."""
