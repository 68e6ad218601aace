"""The base model against the tuned one: their answers, and which answer of a pair they prefer."""
