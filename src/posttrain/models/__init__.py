"""Hugging Face's models behind a packed interface: attention, head and adapters are ours, everything else is theirs."""
