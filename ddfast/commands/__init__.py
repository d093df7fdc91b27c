"""The commands of `ddfast`: their flags, and what each does."""
