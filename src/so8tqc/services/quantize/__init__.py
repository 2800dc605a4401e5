"""A GGUF file in smaller types, with a recipe by which it can be made again.

Read ``service`` first, then ``recipe`` (what is asked, and under which names), ``files`` (one
file after another) and ``stream`` (tensors are looked at while libllama writes the next ones).
``proof`` judges the result, ``imatrix`` computes importance, ``derivation`` is what the record
says of how a file was made.
"""
