"""An adapter in the forms that other programs take, each loaded back and scored before it counts as done."""
