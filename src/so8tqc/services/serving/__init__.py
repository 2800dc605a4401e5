"""``so8tqc serve-config``: the file that a runtime is told by how to serve a GGUF.

Read ``facts`` first (what a file, its records and its temperature say), then ``turns`` (a chat
template as fixed text around each message, where it is no more than that), ``runtimes`` (each
runtime's own form) and ``service``.
"""
