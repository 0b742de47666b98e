"""Text and planted-truth data: corpora, tokenizers, token shards, and the packed stream that training reads."""
