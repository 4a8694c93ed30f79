"""A live model, sharded in any way: which memory of this rank holds which region of which key."""
