"""What each naming is called, how its tensors are laid out, and what its parameter file says."""
