"""Which of several quantizations to ship: measured, recommended, or searched for.

Read ``service`` first, then ``evaluation`` (the files against one reference), ``rows`` (what is
known of one file), ``budget`` (what is asked of it) and ``recommend``. ``search`` looks for the
smallest mixture of two types, by ``groups`` of tensors and ``patterns`` for the quantizer;
``among`` compares files that exist, ``inversions`` explains why a larger one is worse.
"""
