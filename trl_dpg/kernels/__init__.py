"""
Operations with hand-written second derivatives.

The reverse sweep differentiates the backward pass of every operation. For most operations, autograd's second
derivative is used. For a few operations it does not exist, or needs many elementwise passes over the activations.
These operations are replaced while the student runs in a sweep.
"""

from .mode import TwiceDifferentiable


__all__ = ["TwiceDifferentiable"]
