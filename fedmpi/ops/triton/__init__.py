"""Kernels for CUDA written in Triton, beside the torch references in ``fedmpi.ops`` and with the names of
``fedmpi.ops.compiled``; imported through ``ops.fast`` only.

They are held to their references bit by bit in Triton's interpreter, and compiled ahead of time for sm_80 and sm_90
(tests/test_triton.py); they have not been run on a GPU yet. Nothing here asks the device anything.
"""
