"""KV-cached decoding of text and visual tokens, at any tensor and pipeline layout."""
