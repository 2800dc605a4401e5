"""A file for each command: its options, its help, and the service that it calls.

Read ``bake`` first, the shortest whole one. What commands share stands one level up: ``options``,
``stage`` (configure, run, save, show, exit), ``show`` and ``progress``.
"""
