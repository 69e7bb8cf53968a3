"""Glue for other projects' trainers, a module for each; none is imported with ``date_optim``."""
