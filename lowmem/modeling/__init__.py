"""What a checkpoint goes into: a model becomes `Target`s and the rules of its kind."""
