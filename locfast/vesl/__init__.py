"""VESL: boxes and phrases for images that have none, in three steps (CLOC, section 4 and appendix B).

Captions, noun phrases of the captions, and an open-vocabulary detector that is asked for the phrases.
"""
