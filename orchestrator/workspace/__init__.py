"""The folder that holds everything: its layout, atomic files, journals, content keys, error types.

Every other package builds on this one; it imports none of them.
"""
