"""The GGUF file format: read, compared, rewritten; nothing here runs a model.

Read ``file`` first (what a file holds, tensor by tensor), then ``reader`` (gguf-py's, made safe),
``rewrite`` (other tensors or keys, all else byte by byte), ``mixture`` (tensors of two files in
one), ``norm`` (a temperature in the final norm) and ``tensor_map`` (which source tensor is which).
"""
