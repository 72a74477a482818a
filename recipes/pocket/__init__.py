"""Recipe of the pocket model: training data, tokenizer, held-out set and trainer."""
