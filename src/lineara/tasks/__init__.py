"""One drawer per problem: its data (files to batches), its task (loss, optimiser, schedule) and its metrics."""
