"""Adapters that PEFT trained: what they make of a weight, exactly, from the files alone.

Read ``files`` first (a PEFT directory as data: configuration, tensors, which module each part
belongs to), then ``methods`` (a module's parts become *steps*; a file a family, its formulas
derived), ``steps`` and ``products`` (what each step does to W: in float64 with a proven bound,
and exactly), ``rounding`` (each element stored once, from the exact value; ``fused`` is the same of
a LoRA in bfloat16, in one pass), ``names`` (which stored tensor a module's weight is), ``changed``
(one tensor), ``builder`` and ``plan`` (all that a bake writes).

A step maps the logical weight W [out, in] of a module to another one. The last are those nearest to
the input: with gates R in front of a LoRA branch the training computes (W + s·B·A)·(R·x), so the
steps are *add s·B·A*, then *multiply by R*. The room leans on ``rotations`` and ``checkpoints``.
"""
