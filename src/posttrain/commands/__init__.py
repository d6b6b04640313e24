"""The commands of `posttrain`, a module each.

`add(commands, common)` registers a command with its options and a function that takes the parsed options and returns
the exit code. Nothing heavy is imported before that function runs.
"""

COLORS = ("auto", "always", "never")
EXIT_CODES = (
    "exit codes: 0 ok, 1 failure, 2 usage or config, 3 data, 6 locked by another run, 7 disk full, 8 out of memory, "
    "75 interrupted (run again with --resume auto)"
)
