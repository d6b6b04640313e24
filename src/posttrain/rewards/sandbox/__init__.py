"""Model-written programs, run where they can do no harm: two processes shut in by bubblewrap, one for the program and
one for its tests, which the program never sees."""
