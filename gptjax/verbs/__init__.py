"""One file a verb: its arguments and what it does. Heavy imports wait until the arguments are known to be right."""
