"""Many runs from one file, and what they say together: sweeps, where their trials run, and comparisons with statistics."""
