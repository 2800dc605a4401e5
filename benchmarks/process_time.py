"""What the benchmarks know of a process's time on the processor."""

from __future__ import annotations

import resource


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children, such as those in which libllama runs."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
