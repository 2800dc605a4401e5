"""What llama.cpp's converter makes of a model directory: asked in one way by whoever needs it.

``history`` runs the converter until it has been given what it misses and the model says;
``unasked_keys`` is what it would not even miss.
"""
