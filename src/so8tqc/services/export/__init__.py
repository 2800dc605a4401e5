"""A model directory as a GGUF file, and the proof that it is the same model.

Read ``service`` first: it runs the converter, then ``proof`` (every tensor against its source)
and ``logits`` (libllama's against transformers'). ``kept_tensors`` puts baked tensors back
unrounded, ``provenance`` writes what the file says of the bake it comes from.
"""
