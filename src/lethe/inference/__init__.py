"""One loaded model, read: log-probabilities, answers, choices, embeddings."""
