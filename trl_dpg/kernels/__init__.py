"""
Operations whose second derivative is written out.

The reverse sweep differentiates the backward pass of every operation. For most, autograd's own second derivative will
do. For a few it is a chain of elementwise passes over activations, or does not exist. Those are replaced while the
student runs in a sweep.
"""

from .mode import TwiceDifferentiable


__all__ = ["TwiceDifferentiable"]
