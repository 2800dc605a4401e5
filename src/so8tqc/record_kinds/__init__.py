"""What each kind of record measured: the one structure that its service writes and reports read.

On disk ``Record.metrics`` is plain JSON. A service fills the structure of its kind and puts
``metrics.as_json()`` on the record; whoever reads the record asks ``KindMetrics.of(record)`` once
and reads attributes from then on. :mod:`.base` says what an old record may lack.
"""
