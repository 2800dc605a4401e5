"""The calibration set: built from openly licensed text in packages of public registries.

Git holds the manifest (which packages, which files, which licences, which digest) and the rules;
the text itself is read from the packages and never committed.
"""
