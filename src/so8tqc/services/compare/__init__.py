"""Two runs, from their records alone: what changed, and whether by more than chance.

Read ``service`` first, then ``run`` (a run's records, freed of what only says which run it is)
and ``values`` (which values are paired token by token, and which by their intervals).
"""
