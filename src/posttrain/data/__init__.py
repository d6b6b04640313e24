"""From a file of examples to packed batches: sources, formats, templates and masks, packing, planning.

Import what you need from its module; nothing heavy is loaded here.
"""
