"""What a name stands for: models and rotations on a hub or in a package, texts, their windows.

Read ``texts`` first (what is evaluated on), then ``windows`` (which tokens of it are scored),
``dataset_texts``, ``hub`` and ``builtin``.
"""
