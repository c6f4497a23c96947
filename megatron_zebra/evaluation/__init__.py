"""Loss and perplexity of a trained model, by position and by data set."""
