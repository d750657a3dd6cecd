"""What is done with a model that has been trained."""
