"""transformers' own interface: `generate`, streams, and the contract of exactness."""
