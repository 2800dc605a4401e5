"""What ships and what it was made from, as a statement that anybody can make again.

Read ``service`` and ``statement`` first (links with digests, from records), then
``verify_statement`` and ``remake`` (each link made again and compared) and ``stored`` (where
inputs are found). ``verify_file`` is the same for one quantized file, by ``requantize`` and
``recheck``.
"""
