"""Codes for the block formats of GGUF, chosen so that a layer's outputs change least.

Read ``grids`` first (what each format can say), then ``packing`` (codes to bytes and back),
``damped`` (a Hessian made ready for the sweep), ``kernels`` (the sweep and the descent) and
``solve`` (a matrix, its Hessian and a format in, bytes out).

With y = W x, a change δ = W − Q of one row changes its output by δ·x, and the mean square of
that over calibration tokens is δ H δᵀ with H = E[x xᵀ]: rows do not depend on one another, columns
do. A column's rounding error is made up for by the columns that are not rounded yet (GPTQ, Frantar
et al. 2022, arXiv:2210.17323; as feedback through a triangular factor: LDLQ, Chee et al. 2023,
arXiv:2307.13304). Nothing here knows of models or files. All that decides is computed in float64 in
the order that is written, so that the bytes depend neither on threads nor on the CPU.
"""
