"""Text of 2,048 tokens and more: phase, oscillation, error against position, repetition, PET.

Read ``service`` first (teacher-forced text), then ``generation`` (what the model writes by
itself), ``judging`` (series to checks), ``pet`` (was the gate trained with the penalty?) and
``series`` (the file that plots are drawn from).
"""
