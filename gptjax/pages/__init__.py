"""Pages that need nothing but themselves: HTML with its figures inside, and the same as Markdown with PNGs beside it."""
