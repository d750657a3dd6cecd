"""Data flows one way: sources → records → turns → encoded examples → rows → batches. Numpy only, no paddle."""
