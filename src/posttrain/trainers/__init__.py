"""The public trainers: TRL's names and arguments over posttrain's engine."""
