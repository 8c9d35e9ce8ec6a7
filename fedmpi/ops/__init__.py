"""Kernels: packing, selection, transforms. Pure functions of tensors, no state, no communication."""
