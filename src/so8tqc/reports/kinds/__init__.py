"""A file for each kind of record: its tables and its plots.

``reports.sections`` puts them on a page, ``cli.show`` on a terminal. A new kind is one file here
and one line in either.
"""
