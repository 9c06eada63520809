"""From raw documents to shards on disk, and from shards to batches that are functions of the step."""
