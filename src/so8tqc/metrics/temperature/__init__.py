"""Temperatures: every one of them from a single pass over the logits.

Read ``table`` first (what is kept of a token, and why it is enough), then ``kernels`` (how it is
computed), ``measures`` (NLL, ECE, Brier at a temperature), ``fit``, ``groups`` and ``entropy``.
"""
