"""What several operations share: backend choice, tile math, packed-sequence arithmetic."""
