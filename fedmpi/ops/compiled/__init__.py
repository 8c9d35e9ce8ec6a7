"""Kernels compiled by numba, beside the torch references in ``fedmpi.ops``; imported through ``ops.fast`` only.

A compiled function calls only compiled functions of its own file: numba's cache notices changes of no other.
"""
