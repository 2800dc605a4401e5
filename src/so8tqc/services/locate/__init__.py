"""Where two models part: both on the same tokens, layer by layer, operation by operation.

Read ``sides`` first (reference, candidate, and the reference rounded as the candidate's types
round), then ``walk`` (all of them through one layer after another), ``measure`` (what the values
say), ``causes`` (which known mistake explains an operation), ``runtime`` (libllama's own values)
and ``service``. ``config_keys`` is what a GGUF's keys are in a configuration of transformers.
"""
