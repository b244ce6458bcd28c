"""Measurements of every op and of the model against what a user would pick instead. See NOTES.md."""
