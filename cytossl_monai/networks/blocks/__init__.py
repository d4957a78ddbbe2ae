"""Building blocks: iRPE, sparse attention and the transformer block made of them."""
