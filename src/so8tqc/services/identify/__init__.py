"""Which reading of a gate file is the trained one: measured, never guessed.

Read ``service`` first, then ``candidates`` (what the file may mean, and which of it is the same),
``walk`` (all of it side by side on one base), ``by_text`` and ``by_capture`` (what the numbers say)
and ``answer`` (the words, and the gate file that states the facts).
"""
