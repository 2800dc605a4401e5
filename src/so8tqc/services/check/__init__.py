"""``check``: what is this, can it be trusted, what was not looked at, and what comes next.

``recognise`` says what a path is, from its content; ``found`` what lies beside it (records, base,
rotations, tokenizer); ``files``, ``models`` and ``trained`` judge it by itself; ``deeper`` hands it
to ``qc`` and ``verify``; ``service`` puts the answer together.
"""
