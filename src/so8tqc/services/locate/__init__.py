"""Where two models part: both on the same tokens, layer by layer, operation by operation.

Read ``sides`` first (reference, candidate, and ``honest``: the reference rounded as the candidate's
types round), then ``walk`` (all of them through one layer after another), ``measure`` (what the
values say), ``names`` (what operations are called), ``causes`` (which known mistake explains one),
``runtime`` (libllama's own values), ``judge`` and ``service``. ``config_keys`` is what keys of a
GGUF are in a configuration of transformers, ``vocabulary`` whether the tokens are the same.
"""
