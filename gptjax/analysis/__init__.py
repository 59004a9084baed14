"""What goes wrong, and where: predictions on plain lists, made into one page. No jax."""
