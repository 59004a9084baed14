"""Tests, and the modules that some of them run in processes of their own."""

import gc

# What traces leave behind lives long: to look through it as often as Python does by itself takes a tenth of the time.
gc.set_threshold(100_000, 20, 20)
