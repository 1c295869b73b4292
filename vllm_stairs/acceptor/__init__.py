"""What is kept of a staircase: stairs validation for whole batches."""
