"""Is a candidate the model that was trained? Logits, weights, calibration, and a verdict.

Read ``service`` first, then ``models`` (what is run, and which are compared), ``reference`` and
``capture`` (whom we believe), ``texts`` (which tokens count) and ``compatibility`` (what is
refused before anything is compared). ``judging`` makes checks of token tables by the limits of
``profiles``; ``tuning`` says which count; ``merged_files`` names what a GGUF holds of adapters;
``ties`` counts tokens apart whose experts rounding may choose otherwise; ``pairwise``,
``worst_tokens`` and ``token_file`` are what else the record holds.
"""
