"""A model a layer at a time: all texts through layer k before layer k + 1 is read.

``weights`` says where stored tensors are read from, ``shell`` is the model that they are put into
and taken out of again, ``doors`` runs each text's own forward up to the layer that is there,
``states`` keeps hidden states meanwhile, ``lanes`` are the sources that share a layer's weights,
and ``walk`` is the pass over them. ``model`` makes logit sources of it.
"""
