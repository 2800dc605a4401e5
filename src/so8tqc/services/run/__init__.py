"""Stages in a row: what ``so8tqc run`` does.

Read ``pipeline`` first (a config for each stage, its fingerprint, what is reused), then
``preflight`` (what can be known to be wrong beforehand), ``batch`` (a run for each combination of
a matrix) and ``demo``.
"""
