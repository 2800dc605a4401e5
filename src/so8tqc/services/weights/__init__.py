"""Evidence that needs no model: what the files themselves say.

Read ``structure`` first (is everything but the targets untouched, is each target the exact
fold?), then ``diagnose`` and ``examine`` (what was stored instead), ``gguf`` (the same of a
GGUF's attention outputs, dequantized) and ``recover`` (the rotations that a model really
carries). ``bake``, ``qc`` and ``attest`` lean on this room; it leans on none.
"""
