"""What a person looks at: the demonstration and the check of the machine."""
