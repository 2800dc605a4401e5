"""A temperature that is measured on a file's own logits, judged on held-out text, and applied.

Read ``service`` first, then ``holdout`` (which texts fit, which judge), ``verdict`` (is the gain
more than chance?), ``beyond`` (does it hold on other texts?), ``summary`` (the record's metrics)
and ``apply`` (GGUF keys, or the final norm).
"""
