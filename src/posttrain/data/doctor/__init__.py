"""The doctor: what a data set is, and what is wrong with it, before a run is spent on it.

`check.check(files)` reads every row once into a `Tally` (hashes, lengths, marks; in several processes where a file is
large), judges the tally into `Finding`s, and `repair.repair` writes a copy without what can be mended. Import what you
need from its module.
"""
