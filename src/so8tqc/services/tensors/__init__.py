"""Every tensor of a GGUF file: what it must stand for, and whether an honest encoder stored it.

Read ``expected`` first (the weights that the file's tensors must stand for, by the history of the
conversion), then ``measure`` (a stored tensor beside them), ``verdict`` (what that says),
``hypotheses`` (what else was stored) and ``service`` (a whole file). The limits are derived in
``docs/gguf-tensors.md``; no model is run.
"""
