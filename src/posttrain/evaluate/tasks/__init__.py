"""Tasks that make their own data and check their own answers, one file each."""
