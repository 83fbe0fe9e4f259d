"""The study: eight tasks, their runs, and the card made of what they left."""
