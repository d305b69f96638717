"""Making a base model from text: configuration, sequences, and training on the workers of Ray Train."""
