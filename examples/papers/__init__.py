"""The papers' studies, each on data that anyone can get, by this project's optimizers."""
