"""Generation: a loaded model, how it is asked, how the next token is chosen."""
