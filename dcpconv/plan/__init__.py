"""From a source and a wanted naming to boxes of bytes: every key on both sides accounted for."""
