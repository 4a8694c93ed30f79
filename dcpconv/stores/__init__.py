"""Where bytes lie: ranges of bytes in, and nothing about what they mean."""
