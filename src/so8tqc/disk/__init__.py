"""What is asked of the disk: files that are absent or complete, and the process that owns them.

Read ``atomic`` first (a temporary, flushed, renamed), then ``locks`` (who writes here), ``digests``
(what a file is), ``foreign`` (files that somebody else wrote) and ``system`` (what the kernel
refuses, said in words).
"""
