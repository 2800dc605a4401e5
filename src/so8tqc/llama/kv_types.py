"""What libllama keeps keys and values as."""

from __future__ import annotations

DEFAULT_KV_TYPE = "f16"
"""If it is not told otherwise."""
