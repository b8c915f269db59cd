"""The block size of the kernels."""

BLOCK = 1 << 20
"""Elements that a kernel processes at a time. Intermediate results of this size stay in the cache."""
