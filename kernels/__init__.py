"""Triton kernels: one file per op (forward, backward, launch configuration). Importing touches no device."""
