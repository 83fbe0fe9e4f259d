"""What writes the generated parts of the README and of the cards."""
