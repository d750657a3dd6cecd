"""Parallel training in four dimensions: data and sharding, tensor, pipeline, sequence."""
