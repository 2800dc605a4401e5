"""What gates and rotations are read from: native files, trainings' checkpoints, PEFT adapters.

Read ``raw`` first (what a source says, before anything is made of it), then ``native``, ``content``
and ``trained`` (torch and safetensors files of trainings, whose names ``names`` takes apart) and
``peft_oft``. ``pt`` and ``pickle_scan`` load pickles as data. Nothing here assumes what a file does
not say; ``rotations.read`` is where others come in.
"""
