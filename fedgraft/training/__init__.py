"""What a client does locally: data in batches, the step, the engines, evaluation."""
